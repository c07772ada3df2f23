"""Collect the files of the page that `mlx-dg serve` shows."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("mlx_diffusiongemma.server", subdir="page")
