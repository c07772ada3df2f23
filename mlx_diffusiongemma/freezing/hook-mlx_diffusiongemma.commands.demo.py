"""`mlx-dg demo`: the checkpoint that it runs."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("mlx_diffusiongemma", subdir="demo")
