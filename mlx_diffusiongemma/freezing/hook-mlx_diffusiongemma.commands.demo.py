"""Take the checkpoint that `mlx-dg demo` runs."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("mlx_diffusiongemma", subdir="demo")
