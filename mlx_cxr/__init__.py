"""mlx_cxr: explainable multi-modal AI for chest X-rays, native to Apple's MLX. Research only, not for clinical use."""

from mlx_cxr.core.errors import end_quietly_until_started

end_quietly_until_started()

from mlx_cxr.core.device import link_openblas  # noqa: E402

__version__ = "0.1.0"

# Before anything imports mlx.core: the Linux wheel is linked to the reference BLAS, about 30 times slower.
link_openblas()
