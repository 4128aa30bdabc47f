"""The operations of `kernels.reference` as Triton kernels, for NVIDIA GPUs.

Triton comes with the GPU builds of torch; without it the modules here import, and calling an operation raises the
UserError of `language.require_triton`. Every operation is a custom operator of torch, in the namespace
`megatron_llm_triton`, with its autograd formula and its shapes known to torch.compile.
"""
