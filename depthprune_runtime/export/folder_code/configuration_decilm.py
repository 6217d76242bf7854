"""Config of a DeciLM model (`nemotron-nas`): `block_configs` as objects, which vLLM, SGLang and TensorRT-LLM read.

Needs transformers, and nothing else. Written by depthprune_runtime (Apache-2.0).
"""

from types import SimpleNamespace

from transformers import LlamaConfig


def _block(data):
    """One entry of block_configs; what is an object already stays one."""
    if not isinstance(data, dict):
        return data
    return SimpleNamespace(**{half: SimpleNamespace(**values) for half, values in data.items()})


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"
    block_configs = ()

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [_block(data) for data in block_configs or []]

    def to_dict(self):
        data = super().to_dict()
        data["block_configs"] = [
            {half: dict(vars(values)) for half, values in vars(block).items()} for block in self.block_configs
        ]
        return data
