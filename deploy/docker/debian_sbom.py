"""Add the image's Debian packages to an SBOM of Python's: `debian_sbom.py SBOM PACKAGES`.

SBOM is a CycloneDX file, changed in place. PACKAGES has a line for each package, with tabs between
name, version, architecture and source, as `dpkg-query` of the image's base wrote it: the stage that
runs this has more packages than the image will have.
"""

import json
import sys
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL


def component(line: str) -> dict[str, Any]:
    """Return what CycloneDX says of one package."""
    name, version, architecture, source = line.split("\t")
    told = {"arch": architecture, "distro": "debian-12", "upstream": source}
    purl = PackageURL("deb", "debian", name, version, told).to_string()
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def with_packages(sbom: dict[str, Any], packages: str) -> dict[str, Any]:
    """Return an SBOM with these packages, the same for the same input."""
    found = [component(line) for line in sorted(packages.splitlines()) if line]
    return {**sbom, "components": [*sbom.get("components", []), *found]}


def main() -> None:
    """Change the file, or fail with what makes it no SBOM."""
    path, packages = Path(sys.argv[1]), Path(sys.argv[2])
    text = json.dumps(with_packages(json.loads(path.read_text()), packages.read_text()), indent=2)
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        sys.exit(f"{path}: {error}")
    path.write_text(text)


if __name__ == "__main__":
    main()
