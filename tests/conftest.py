"""Where there is no GPU, Triton kernels run in its interpreter, which must be said before Triton is imported."""

import os

import hypothesis
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A first call compiles; on a GPU most examples have constants of their own and are such a call.
hypothesis.settings.register_profile("vlmfx", deadline=None, max_examples=20 if torch.cuda.is_available() else 100)
hypothesis.settings.load_profile("vlmfx")

# Tests on a pretend device, which test_mlu_device.py runs in a process of their own.
collect_ignore = [] if os.environ.get("VLMFX_MLU_DEVICE") else ["mlu_device"]
