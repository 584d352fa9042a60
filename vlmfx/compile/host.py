"""Host: what of a machine an ahead-of-time program is built for, and whether another machine can run it."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmfx.errors import CompileError, shown

# The instructions of the levels of the x86-64 psABI, by Linux's names.
_V2 = frozenset(["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"])
_V3 = _V2 | frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
MARCHES = {"x86-64-v2": (_V2, 1), "x86-64-v3": (_V3, 256), "x86-64-v4": (_V4, 512)}  # instructions, bits of a vector
_INSTRUCTIONS = re.compile(
    r"pni|ssse3|sse4_[12]|avx\w*|amx_\w+|fma|f16c|bmi[12]|abm|movbe|adx|popcnt|cx16|lahf_lm|xsave\w*|aes|vaes|gfni|"
    r"v?pclmulqdq|sha\w*|rdrand|rdseed|asimd\w*|sve\w*|bf16|i8mm|fp|fphp"
)


@dataclass(frozen=True, kw_only=True)
class Host:
    """torch_version: of the torch that builds. device: "cpu", "cuda" or "mlu", of name device_name and compute capability. machine: the
    processor's architecture; march: how much of it is used, "native" or one of MARCHES; flags: the instructions it then must have."""

    torch_version: str
    device: str
    device_name: str
    capability: tuple[int, ...]
    machine: str
    march: str
    flags: tuple[str, ...]

    @classmethod
    def of(cls, device: torch.device, march: str = "native") -> Host:
        """This machine, for programs of a device. Raises CompileError for an unknown march."""
        if march != "native" and (march not in MARCHES or platform.machine() != "x86_64"):
            known = ", ".join(["native", *MARCHES])
            raise CompileError(
                f"march is {shown(march)} but must be one of {known}, on {platform.machine()}; choose one."
            )
        flags = cpu_flags() if march == "native" else MARCHES[march][0]
        is_cuda = device.type == "cuda"
        return cls(
            torch_version=str(torch.__version__),
            device=device.type,
            device_name=torch.cuda.get_device_name(device) if is_cuda else "",
            capability=tuple(torch.cuda.get_device_capability(device)) if is_cuda else (),
            machine=platform.machine(),
            march=march,
            flags=tuple(sorted(flags)),
        )

    @property
    def inductor_options(self) -> dict[str, Any]:
        """What makes Inductor build for it."""
        return {} if self.march == "native" else {"cpp.march": self.march, "cpp.simdlen": MARCHES[self.march][1]}

    def refusal(self) -> str | None:
        """Why this machine cannot run what was built for that host, as "it was built for …, but …"; None where it can."""
        here = [
            ("torch", self.torch_version, str(torch.__version__)),
            ("processors of type", self.machine, platform.machine()),
        ]
        if self.device == "cuda":
            found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
            here.append(("GPU", self.device_name, found))
        for what, wanted, found in here:
            if found != wanted:
                return f"it was built for {what} {wanted} but this machine has {found}"
        missing = sorted(set(self.flags) - cpu_flags())
        if missing:
            return f"it was built for processors with {', '.join(missing[:4])}, which this one lacks"
        return None


def cpu_flags() -> frozenset[str]:
    """Instructions of this processor that programs may use, by Linux's names; none where they cannot be known."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(f for f in (found[1].split() if found else ()) if _INSTRUCTIONS.fullmatch(f))
