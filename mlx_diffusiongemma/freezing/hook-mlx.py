"""MLX: the modules that its extension imports, its libraries, and on a Mac the GPU's kernels beside them."""

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs

hiddenimports = ["mlx._reprlib_fix", "mlx.__array_api_info"]
binaries = collect_dynamic_libs("mlx")
datas = collect_data_files("mlx", subdir="lib", includes=["*.metallib"])
