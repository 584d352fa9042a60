"""The kernels of MLU370, in BANG C: kernels/*.mlu, one a file, and bindings.cpp, which makes torch ops of them.

No card and no compiler for one was at hand: what runs in tests runs in emu/, and docs/mlu.md says what that proves."""
