"""The CUDA kernels, in Triton: launch and kernel of one op a file; imported on the first call with a CUDA tensor."""
