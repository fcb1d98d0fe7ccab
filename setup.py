"Every field comes from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    long_description=(root/"README.md").read_text(encoding="utf-8") if (root/"README.md").exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    license="Apache-2.0", license_files=["LICENSE"], keywords=cfg["keywords"].split(),
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research", "Programming Language :: Python :: 3",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=["memnotes", "memnotes.*"]), include_package_data=True,
    python_requires=">=" + cfg["min_python"], install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "index": cfg["index_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split()})
