"""DDT in diffusers: a pipeline of transformer, autoencoder and scheduler that samples with ddt_fast's engine.

pipe = DDTPipeline.from_pretrained("folder or hub id").to("cuda")
images = pipe(class_labels=["golden retriever", 207], num_inference_steps=50).images
"""

from diffusers import ModelMixin, SchedulerMixin

from ddt_fast.pipeline.pipeline import DDTPipeline
from ddt_fast.pipeline.scheduler import DDTScheduler
from ddt_fast.pipeline.transformer import DDTTransformer2DModel

__all__ = ["DDTPipeline", "DDTScheduler", "DDTTransformer2DModel", "ModelMixin", "SchedulerMixin"]

# diffusers writes a component's module into model_index.json. To load the component, it imports that module and looks
# in it for the component's class and for ModelMixin or SchedulerMixin, which decide how to load it. Saved pipelines
# name this package, not a file in it.
for _component in (DDTScheduler, DDTTransformer2DModel):
    _component.__module__ = __name__
