"""Write extproc/ext_proc.binpb: the descriptors that the hot-path codec is made of.

The ``xds-protos`` package has them, but it installs top-level packages named ``xds`` and ``envoy``, so it is
only ever installed into an environment that is thrown away. Run by ``make protos``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

XDS_PROTOS = "xds-protos==1.85.0"
OUTPUT = Path(__file__).parent.parent / "extproc" / "ext_proc.binpb"

EXTRACT = """
import sys
from google.protobuf import descriptor_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2

files = {}
def visit(file):
    if file.name not in files:
        for dependency in file.dependencies:
            visit(dependency)
        proto = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(proto)
        files[file.name] = proto
visit(external_processor_pb2.DESCRIPTOR)
sys.stdout.buffer.write(descriptor_pb2.FileDescriptorSet(file=files.values()).SerializeToString(deterministic=True))
"""


def main() -> None:
    """Make the environment, extract the descriptors, write the file."""
    with tempfile.TemporaryDirectory() as directory:
        venv.create(directory, with_pip=True)
        python = str(Path(directory) / "bin" / "python")
        print(f"installing {XDS_PROTOS} into a throw-away environment", file=sys.stderr)
        subprocess.run([python, "-m", "pip", "install", "--quiet", XDS_PROTOS], check=True)
        extracted = subprocess.run([python, "-I", "-c", EXTRACT], check=True, stdout=subprocess.PIPE)
    OUTPUT.write_bytes(extracted.stdout)
    print(f"{OUTPUT.name}: {len(extracted.stdout)} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
