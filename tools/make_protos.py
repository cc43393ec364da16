"""Write the descriptor sets that the upb codecs are made of: extproc/ext_proc.binpb and usage/access_log.binpb.

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
ROOT = Path(__file__).parent.parent
OUTPUTS = {
    "envoy.service.ext_proc.v3.external_processor_pb2": ROOT / "extproc" / "ext_proc.binpb",
    "envoy.service.accesslog.v3.als_pb2": ROOT / "usage" / "access_log.binpb",
}
"""Files by the generated module whose descriptors, and all that they are made of, go into each."""

EXTRACT = """
import importlib
import sys
from google.protobuf import descriptor_pb2

files = {}
def visit(file):
    if file.name not in files:
        for dependency in file.dependencies:
            visit(dependency)
        proto = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(proto)
        files[file.name] = proto
visit(importlib.import_module(sys.argv[1]).DESCRIPTOR)
sys.stdout.buffer.write(descriptor_pb2.FileDescriptorSet(file=files.values()).SerializeToString(deterministic=True))
"""


def main() -> None:
    """Make the environment, extract the descriptors, write the files."""
    with tempfile.TemporaryDirectory() as directory:
        venv.create(directory, with_pip=True)
        python = str(Path(directory) / "bin" / "python")
        print(f"installing {XDS_PROTOS} into a throw-away environment", file=sys.stderr)
        subprocess.run([python, "-m", "pip", "install", "--quiet", XDS_PROTOS], check=True)
        for module, output in OUTPUTS.items():
            command = [python, "-I", "-c", EXTRACT, module]
            extracted = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            output.write_bytes(extracted.stdout)
            print(f"{output.name}: {len(extracted.stdout)} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
