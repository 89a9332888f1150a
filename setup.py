"""What pyproject.toml cannot say: ds_configs/, at the top of the repository, goes into the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["scale_prune", "scale_prune.*"]), "scale_prune.ds_configs"],
    package_dir={"scale_prune.ds_configs": "ds_configs"},
)
