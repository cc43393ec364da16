"""TLS towards backends: SNI, and a certificate of a trusted authority for that very name."""

from __future__ import annotations

from pathlib import Path

from envoy_data_plane.envoy.config.core.v3 import DataSource, TransportSocket
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
    CertificateValidationContext,
    CommonTlsContext,
    SubjectAltNameMatcher,
    SubjectAltNameMatcherSanType,
    UpstreamTlsContext,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from gateway.settings import SettingsError, XdsSettings
from policies.model import BackendUri
from xds.resources.endpoints import is_address

# Debian and Alpine; Fedora and RHEL; macOS and OpenSSL's own default.
SYSTEM_CA_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def ca_file(settings: XdsSettings) -> str:
    """PEM bundle of trusted authorities, as a path on Envoy's machine.

    Raises:
        SettingsError: UPSTREAM_CA_FILE is not set and no system bundle was found.
    """
    if settings.upstream_ca_file:
        return settings.upstream_ca_file
    for path in SYSTEM_CA_FILES:
        if Path(path).is_file():
            return path
    raise SettingsError(
        f"UPSTREAM_CA_FILE: https backends need trusted authorities, and none of {', '.join(SYSTEM_CA_FILES)} exists"
    )


def upstream_tls(uri: BackendUri, settings: XdsSettings) -> TransportSocket:
    """Transport socket for an https backend.

    Raises:
        SettingsError: there are no authorities to check against.
    """
    kind = SubjectAltNameMatcherSanType.IP_ADDRESS if is_address(uri.host) else SubjectAltNameMatcherSanType.DNS
    validation = CertificateValidationContext(
        trusted_ca=DataSource(filename=ca_file(settings)),
        match_typed_subject_alt_names=[SubjectAltNameMatcher(san_type=kind, matcher=StringMatcher(exact=uri.host))],
    )
    context = UpstreamTlsContext(
        common_tls_context=CommonTlsContext(validation_context=validation),
        sni="" if is_address(uri.host) else uri.host,
    )
    return TransportSocket(name="envoy.transport_sockets.tls", typed_config=Any.pack(context))
