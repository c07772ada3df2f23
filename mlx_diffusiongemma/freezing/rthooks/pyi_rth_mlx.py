"""Open MLX's library where it lies before its extension opens it through PyInstaller's link at the top: it looks for
the GPU's kernels beside the path that it was first opened by.
"""


def _open() -> None:
    import ctypes
    import sys
    from pathlib import Path

    for library in Path(sys._MEIPASS, "mlx", "lib").glob("libmlx.*"):
        if library.suffix in (".so", ".dylib"):
            ctypes.CDLL(str(library))


_open()
