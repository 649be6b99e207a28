#!/bin/sh
# Installs Baton into /opt/baton, as the Dockerfile's stages ask for it:
#   install.sh libraries cpu|cuda   all that Baton needs, so that a change of its code keeps the layer
#   install.sh baton                Baton itself, from /src
#   install.sh sbom                 what is in there, as CycloneDX, to /opt/baton/sbom.cdx.json
# Every version is that of /build/constraints*.txt. The environment may name other indexes (PIP_*).
set -eu

here=$(dirname "$0")
cpu_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

pip_of() { # pip_of VENV ARGUMENTS...
    venv=$1
    shift
    "$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check --quiet \
        --constraint "$here/constraints.txt" --constraint "$here/image-constraints.txt" "$@"
}

libraries() {
    torch=$(sed -n 's/^torch==//p' "$here/constraints.txt")
    case $1 in
    # The local version is asked for by name: a CUDA build of it would also satisfy "torch".
    cpu) pip_of /opt/baton --extra-index-url "$cpu_index" "torch==$torch+cpu" ;;
    cuda) pip_of /opt/baton "torch==$torch" ;;
    *)
        echo "install.sh libraries: '$1' is not allowed; allowed: cpu, cuda" >&2
        exit 2
        ;;
    esac
    /opt/baton/bin/python - "$here/pyproject.toml" >/tmp/requirements.txt <<'PYTHON'
import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"], sep="\n")
PYTHON
    # Ray's dashboard takes jobs, and its agent tells KubeRay that a node is well.
    pip_of /opt/baton --requirement /tmp/requirements.txt "ray[default]" hatchling
}

baton() {
    pip_of /opt/baton --no-build-isolation --no-deps /src
    /opt/baton/bin/python -m pip check
    install -m 755 /src/deploy/docker/healthcheck.py /opt/baton/bin/baton-healthcheck
    # What only the build needs. Byte code stays: those who run this cannot write it.
    /opt/baton/bin/python -m pip uninstall --yes --quiet hatchling
    /opt/baton/bin/baton version
}

sbom() {
    pip_of /opt/sbom cyclonedx-bom
    /opt/sbom/bin/cyclonedx-py environment --output-reproducible \
        --output-file /opt/baton/sbom.cdx.json /opt/baton/bin/python
}

phase=$1
shift
case $phase in
libraries | baton | sbom) "$phase" "$@" ;;
*)
    echo "install.sh: '$phase' is not allowed; allowed: libraries, baton, sbom" >&2
    exit 2
    ;;
esac
