"""The named experiments: the digits that come with the package, and the paper's on ImageNet.

The paper trains every size for 80 epochs, XL/2 for 256 and 400 as well, all with REPA; 512 px is fine-tuned from 256 px
(`--training.init`), here for 20 epochs.
"""

from ddt_fast.config import DataConfig, DDTConfig, Experiment, SamplingConfig, TrainingConfig

_EPOCH = 1_281_167 / 256
"""Steps per epoch of ImageNet's training images, at batch size 256."""


def _imagenet(
    size: tuple[int, int, int, int], epochs: int = 80, repa: bool = True, image_size: int = 256, guidance: float = 2.0
) -> Experiment:
    """The paper's settings for a model of size (hidden_size, num_heads, num_blocks, num_encoder_blocks)."""
    return Experiment(
        model=DDTConfig(4, 2, *size, num_classes=1000),
        data=DataConfig(dataset="latents", image_size=image_size, autoencoder="stabilityai/sd-vae-ft-ema"),
        training=TrainingConfig(max_steps=int(round(epochs * _EPOCH, -4)), repa_weight=0.5 if repa else 0.0),
        sampling=SamplingConfig(guidance_scale=guidance),
    )


_B2, _L2, _XL2 = (768, 12, 12, 8), (1024, 16, 24, 20), (1152, 16, 28, 22)

PRESETS: dict[str, Experiment] = {
    "digits": Experiment(
        model=DDTConfig(
            in_channels=1, patch_size=2, hidden_size=64, num_heads=2, num_blocks=4, num_encoder_blocks=3, num_classes=10
        ),
        training=TrainingConfig(
            max_steps=2800,
            batch_size=128,
            learning_rate=2e-3,
            ema_decay=0.999,
            dtype="float32",
            checkpoint_every=500,
            log_every=20,
            sample_every=1000,
            sample_images=100,
            score_samples=898,
        ),
        sampling=SamplingConfig(num_steps=25, guidance_scale=1.5, last_step=None, solver="lms"),
    ),
    "b2_256": _imagenet(_B2),
    "b2_256_without_repa": _imagenet(_B2, repa=False),
    "l2_256": _imagenet(_L2),
    "l2_256_without_repa": _imagenet(_L2, repa=False),
    "xl2_256": _imagenet(_XL2),
    "xl2_256_without_repa": _imagenet(_XL2, repa=False),
    "xl2_256_256_epochs": _imagenet(_XL2, epochs=256),
    "xl2_256_400_epochs": _imagenet(_XL2, epochs=400),
    "xl2_512": _imagenet(_XL2, epochs=20, image_size=512, guidance=3.0),
}
