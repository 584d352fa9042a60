"""Where there is no GPU, Triton kernels run in its interpreter, which must be said before Triton is imported."""

import os

import hypothesis
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("vlmfx", deadline=None)  # a first call compiles
hypothesis.settings.load_profile("vlmfx")
