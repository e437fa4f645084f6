"""How a pipeline is loaded and saved."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines import pipeline_utils
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import is_accelerate_available
from huggingface_hub import create_repo

from ddt_fast.autoencoder import default_dtype_kept, load_vae
from ddt_fast.checks import require, require_arguments, require_path
from ddt_fast.config import DataConfig, DDTConfig, Experiment
from ddt_fast.files import atomic_folder
from ddt_fast.hub import fetch, is_hub_id
from ddt_fast.model.card import UNKNOWN, Provenance, read_provenance, require_license, write_model_card
from ddt_fast.model.lightning import WeightSet
from ddt_fast.model.weights import experiment_of, has_config, load_model, require_float, resolve_checkpoint
from ddt_fast.pipeline.component import SAVING_OPTIONS, UPLOAD_OPTIONS, check_loading, check_saving
from ddt_fast.pipeline.folder import INDEX_NAME, OWNED_NAMES, check_pipeline, check_pipeline_replaceable
from ddt_fast.pipeline.scheduler import DDTScheduler
from ddt_fast.pipeline.transformer import DDTTransformer2DModel
from ddt_fast.presets import PRESETS
from ddt_fast.wording import one_line

_WEIGHTS = "diffusion_pytorch_model*"
_FETCHED = [
    *("model_index.json", "training.json", "metrics.json", "scheduler/scheduler_config.json"),
    *(f"{folder}config.json" for folder in ("", "transformer/", "vae/")),
    *(f"{folder}{_WEIGHTS}.{kind}" for folder in ("", "transformer/", "vae/") for kind in ("safetensors", "json")),
]
_DTYPE = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
"""The name of the argument in this version of diffusers; older versions ignore the new name."""
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_OF_MODELS = ("torch_dtype", "dtype", "vae", "id2label", "preset", "weights")
_OF_PIPELINES = (
    *("torch_dtype", "dtype", "variant", "use_safetensors", "transformer", "vae", "scheduler", "id2label"),
    *("device_map", "max_memory", "offload_folder", "offload_state_dict", "low_cpu_mem_usage", "disable_mmap"),
    *("quantization_config", "custom_pipeline", "custom_revision", "trust_remote_code", "load_connected_pipeline"),
)


class SavedPipeline(DiffusionPipeline):
    """The part of `DDTPipeline` that reads and writes files."""

    transformer: DDTTransformer2DModel
    vae: AutoencoderKL | None
    scheduler: DDTScheduler
    data: DataConfig
    provenance: Provenance = UNKNOWN

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a pipeline that `save_pretrained` wrote, or make one from a model folder, such as a training run's
        model/. Only safetensors and JSON are fetched and read: nothing in a folder or repository is executed.

        Args:
            pretrained_model_name_or_path: a local folder or a hub id; cached files need no network.
            kwargs: torch_dtype (default: float32), parts of your own (transformer, vae, scheduler, id2label),
                cache_dir, force_download, local_files_only, token, revision, variant, and the others of
                `DiffusionPipeline.from_pretrained`; for a model folder torch_dtype, vae and id2label.

        Raises:
            ValueError: an argument is unknown, there is no pipeline, parts have other classes, settings are not
                allowed, or weights are not safetensors or do not fit.
            OSError: files are missing or cannot be read.
        """
        folder = require_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        require_arguments("from_pretrained", kwargs, list(dict.fromkeys((*_OF_PIPELINES, *_OF_MODELS, *_HUB_OPTIONS))))
        check_loading(kwargs)
        code = kwargs.pop("custom_pipeline", None)
        require(code is None, "custom_pipeline", code, "None, because no code is fetched or run")
        for option in ("torch_dtype", "dtype"):
            given = kwargs.get(option)
            for dtype in given.values() if isinstance(given, Mapping) else [given]:
                if dtype is not None:
                    require_float(option, dtype)
        hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        if folder.is_file():
            raise ValueError(f"{folder} is a file; use from_single_file")
        if not folder.is_dir():
            if not is_hub_id(name := str(pretrained_model_name_or_path)):
                raise ValueError(f"{name} is not a local folder, nor a hub id such as user/model")
            folder = fetch(name, _FETCHED, **hub)
        if not (folder / INDEX_NAME).is_file():
            require_arguments("from_pretrained of a model folder", kwargs, _OF_MODELS)
            return cls.from_single_file(folder, **kwargs)
        require_arguments("from_pretrained of a pipeline", kwargs, _OF_PIPELINES)
        check_pipeline(folder)
        dtypes = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
        if dtypes != (None, None):
            kwargs[_DTYPE] = dtypes[0] or dtypes[1]
        kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())
        try:
            with default_dtype_kept():
                pipe = super().from_pretrained(str(folder), use_safetensors=True, **kwargs)
        except (ValueError, OSError, MemoryError):
            raise
        except Exception as error:  # diffusers may raise anything on a damaged config.json
            raise ValueError(f"{folder} could not be loaded: {type(error).__name__}: {one_line(error)}") from error
        pipe.provenance = read_provenance(folder)
        return pipe

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        *,
        preset: str | Experiment | None = None,
        weights: WeightSet = "ema",
        vae: AutoencoderKL | str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        id2label: dict[int, str] | None = None,
    ) -> Self:
        """Make a pipeline from a released Lightning .ckpt, a .safetensors or a model folder; nothing in it is executed.

        Args:
            pretrained_model_link_or_path: the local file or folder.
            preset: settings for a file without config.json: the name of one of `ddt_fast.presets.PRESETS`, or an
                Experiment; None takes the first preset with the weights' shapes (256 px, for XL/2).
            weights: the weights of a .ckpt to take: "ema", the averaged ones, or "raw".
            vae: the autoencoder, or where it is; None loads the one that the settings name, if any.
            torch_dtype, dtype: the dtype of all weights, by either of diffusers' names; None is float32.
            id2label: as for `DDTPipeline`.

        Raises:
            ValueError: the file is missing or corrupt, or holds more than tensors, settings do not fit it, or the
                autoencoder cannot be loaded.
        """
        source = resolve_checkpoint(pretrained_model_link_or_path)
        experiment = preset if isinstance(preset, Experiment) else None
        if experiment is None and (has_config(source) or preset is not None):
            experiment = experiment_of(source, preset)  # type: ignore[arg-type]
        config = None if experiment is None or has_config(source) else experiment.model
        dtype = dtype or torch_dtype or torch.float32
        model = load_model(source, "cpu", dtype, config, weights)
        experiment = experiment or _preset_like(model.config)
        data, sampling = experiment.data, experiment.sampling
        if vae is None and data.autoencoder is not None:
            vae = data.autoencoder
        if isinstance(vae, (str, Path)):
            vae = load_vae(str(vae), torch.device("cpu"), dtype)
        transformer = DDTTransformer2DModel.from_reference(model, data, sampling)
        scheduler = DDTScheduler(**asdict(sampling))
        parts: dict[str, Any] = {"transformer": transformer, "vae": vae, "scheduler": scheduler, "id2label": id2label}
        pipe = cls(**parts)
        if source.is_dir():
            pipe.provenance = read_provenance(source)
        return pipe

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        license: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a folder that `from_pretrained` reads, whole or not at all, with a model card; `ddt_fast.load_model`
        reads its transformer/. An older pipeline in the folder is replaced.

        Args:
            save_directory: the folder.
            safe_serialization: True; pickles are not written.
            variant: part of the weights' file names, such as "fp16".
            max_shard_size: larger weights are split, such as "5GB"; None is diffusers' 10 GB.
            push_to_hub: also upload the folder.
            license: the license's identifier on the Hub for the card, such as "mit"; None leaves it out.
            kwargs: repo_id, private, token, commit_message and create_pr of an upload.

        Raises:
            ValueError: an argument is unknown, or the folder holds anything but a pipeline.
            OSError: the folder cannot be written.
        """
        options: dict[str, Any] = {"variant": variant, "max_shard_size": max_shard_size}
        given = {"safe_serialization": safe_serialization, **options, **kwargs}
        folder = check_saving(save_directory, given, *SAVING_OPTIONS, "license")
        require_license(license)
        if not self.transformer.is_plain:
            raise ValueError("the transformer is adapted or quantised; merge or unload its adapters first")
        self.transformer.register_to_config(sampling=asdict(self.scheduler.sampling_config), data=asdict(self.data))
        check_pipeline_replaceable(folder)
        with atomic_folder(folder, OWNED_NAMES) as temporary:
            super().save_pretrained(str(temporary), **options)
            self.provenance.save(temporary)
            write_model_card(temporary, license=license)
        if push_to_hub:
            self._upload(folder, kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(self, repo_id: str, commit_message: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Upload to the Hub what `save_pretrained` writes, with the model card.

        Args:
            repo_id: the repository; created if missing.
            commit_message: the message of the upload.
            kwargs: private, token and create_pr of the upload, and arguments of `save_pretrained`.
        """
        upload = {name: kwargs.pop(name) for name in UPLOAD_OPTIONS if name in kwargs}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "pipeline"
            self.save_pretrained(folder, **kwargs)
            return self._upload(folder, repo_id, commit_message=commit_message, **upload)

    def _upload(
        self, folder: Path, repo_id: str, private: bool | None = None, token: str | None = None, **options: Any
    ) -> Any:
        try:
            repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            return self._upload_folder(folder, repo_id, token=token, **options)
        except (ValueError, OSError):
            raise
        except Exception as error:  # the HTTP library's, which depends on the version of huggingface_hub
            raise OSError(f"{repo_id} could not be uploaded: {error}") from error


def _preset_like(config: DDTConfig) -> Experiment:
    """The first preset of this shape, with any number of classes, as in `load_model`."""
    preset = next(
        preset for preset in PRESETS.values() if replace(preset.model, num_classes=config.num_classes) == config
    )
    return Experiment(config, preset.data, sampling=preset.sampling)
