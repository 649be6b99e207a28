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

torch_version() { sed -n 's/^torch==//p' "$here/constraints.txt"; }

refuse() { # refuse WHAT ALLOWED
    echo "install.sh $1 is not allowed; allowed: $2" >&2
    exit 2
}

libraries() {
    build=${1-}
    case $build in
    # Asked for by its local version: a CUDA build would also do for "torch".
    cpu) set -- --extra-index-url "$cpu_index" "torch==$(torch_version)+cpu" ;;
    cuda) set -- "torch==$(torch_version)" ;;
    *) refuse "libraries: '$build'" "cpu, cuda" ;;
    esac
    pip_of /opt/baton "$@"
    /opt/baton/bin/python - "$here/pyproject.toml" >/tmp/requirements.txt <<'PYTHON'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["server"], sep="\n")
PYTHON
    # Ray's dashboard takes jobs, and its agent tells KubeRay that a node is well.
    pip_of /opt/baton --requirement /tmp/requirements.txt "ray[default]" hatchling
    /opt/baton/bin/python -c "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda)"
    /opt/baton/bin/python -c "import torch; exit(bool(torch.version.cuda) != ('$build' == 'cuda'))" ||
        refuse "libraries $build: this build of torch" "that of $build; see the indexes in PIP_*"
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
    /opt/sbom/bin/python "$here/debian_sbom.py" /opt/baton/sbom.cdx.json /usr/share/baton-packages
}

phase=${1-}
[ $# -eq 0 ] || shift
case $phase in
libraries | baton | sbom) "$phase" "$@" ;;
*) refuse "'$phase'" "libraries, baton, sbom" ;;
esac
