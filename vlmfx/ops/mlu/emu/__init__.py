"""The kernels built for this machine's CPU, with bang_emu.h in place of the card: for tests only."""
