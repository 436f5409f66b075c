"""Half precision stays in the network's products: norms, softmax, similarities and losses are in float32."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import MODELS
from modules.runtime.environment import autocast
from tests.run.test_plugin import LLAMA, OWN_FLAGS, build

# Batch normalisation and flash attention read and write half precision and compute in float32.
IN_FLOAT32 = (
    "softmax",
    "layer_norm",
    "vector_norm",
    "logsumexp",
    "log",
    "exp",
    "cross_entropy",
    "nll_loss",
    "mean",
    "binary_cross_entropy",
    "rsqrt",
)

ADAPTED = "adapters"
ADAPTERS = ["--model_name", "hf", "--lora_rank", "2", "--decoder_config", LLAMA]


class HalfPrecisionSeen(TorchDispatchMode):
    """Collects the operations of IN_FLOAT32 that are given half precision."""

    def __init__(self):
        super().__init__()
        self.found, self.count = set(), 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__.strip("_").removesuffix("_backward_data").removesuffix("_backward")
        if name.removeprefix("native_").removeprefix("log_").removeprefix("linalg_") in IN_FLOAT32:
            self.count += 1
            kinds = {part.dtype for part in arguments if isinstance(part, torch.Tensor)}
            if kinds & {torch.bfloat16, torch.float16}:
                self.found.add(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("backbone", [*MODELS, ADAPTED])
def test_what_needs_float32_is_given_float32(demo, demo_index, demo_labels, backbone, precision):
    flags = ADAPTERS if backbone == ADAPTED else ["--model_name", backbone, *OWN_FLAGS[backbone]]
    *_, objective, loader = build(demo, demo_index, *flags)
    batch = next(iter(loader)).to("cpu")
    objective.train()
    torch.manual_seed(0)
    exact = objective(batch, 2)
    torch.manual_seed(0)
    with HalfPrecisionSeen() as seen:
        with autocast(torch.device("cpu"), precision):
            terms = objective(batch, 2)
        terms["loss"].backward()
    assert not seen.found and seen.count > 10
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert torch.is_autocast_enabled("cpu") is False
    # Dropout may draw otherwise in another type: near, not equal.
    assert terms["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.1)
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
    statistics = [buffer for name, buffer in objective.named_buffers() if name.endswith("running_var")]
    assert statistics and all(buffer.dtype == torch.float32 for buffer in statistics)


@pytest.mark.parametrize("tf32", ["true", "false"])
def test_tf32_is_what_the_flag_says(demo, demo_index, tf32):
    build(demo, demo_index, "--tf32", tf32)
    asked = tf32 == "true"
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is asked
