"""Keys and certificates of a deployment, made with the package `cryptography`, a dependency of Flower.

A server presents a certificate that its sites trust. Each site has a key pair, and the server knows the public half.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from consilium.addresses import parse_host
from consilium.core import CLIENT_ID
from consilium.engine.checkpoint import write_atomic
from consilium.errors import ConfigError

__all__ = ["certificates", "certified", "check_key", "is_signed", "owners", "public_text", "sign", "site_key"]

_MARK = "@consilium"
"""Suffix of a site's name in the comment of its public key."""
LOCAL = ("localhost", "127.0.0.1", "::1")
YEARS = 2
"""Validity of a server's certificate, in years."""


def certificates(folder: Path, hosts: Sequence[str], sites: Sequence[str]) -> list[Path]:
    """Create what is missing in a folder: the server's certificate for `hosts`, and a key for each new site.

        server/     server.crt, server.key, ca.crt, and <site>.pub of every site: for the server alone
        <site>/     ca.crt, key and key.pub: to be handed to that site

    The authority that signs the server's certificate discards its key at once, so no other certificate can be signed
    with it. A site can also make its secret key itself (`ssh-keygen -t ecdsa -b 384`); only its .pub must reach the
    server.

    Args:
        hosts: names and addresses under which sites reach the server; localhost, 127.0.0.1 and ::1 are always added. If
            the list differs from the certificate's, a new authority and certificate are made, and the new ca.crt is
            copied into the sites' folders that are here. (): the certificate stays as it is.
        sites: names of the sites; a site that already has a folder is skipped.

    Returns:
        The site folders that were made.

    Raises:
        ConfigError: for a site name or a host that cannot be used.
    """
    hosts = [_parsed(host) for host in hosts]
    for site in sites:
        if not CLIENT_ID.fullmatch(site) or site == "server":
            raise ConfigError(f"site {site!r} must match [A-Za-z0-9._-]{{1,64}}, without a leading dot, not 'server'")
    has_server_key = (folder / "server/server.key").exists()
    if not has_server_key or (hosts and {*hosts} - {*LOCAL} != {*certified(folder / "server")} - {*LOCAL}):
        _server_certificate(folder / "server", hosts)
        for ca_copy in folder.glob("*/ca.crt"):
            write_atomic(ca_copy, (folder / "server/ca.crt").read_bytes())
    folders = []
    for site in sites:
        if (folder / site).exists():
            continue
        key = ec.generate_private_key(ec.SECP384R1())
        public_key = _public(key)
        _write_secret(folder / site / "key", _private(key, serialization.PrivateFormat.OpenSSH))
        write_atomic(folder / site / "key.pub", public_key + f" {site}{_MARK}\n".encode())
        write_atomic(folder / site / "ca.crt", (folder / "server/ca.crt").read_bytes())
        write_atomic(folder / "server" / f"{site}.pub", public_key + b"\n")
        folders.append(folder / site)
    return folders


def certified(folder: Path) -> list[str]:
    """Return the hosts that the certificate in the server's folder is for.

    Raises:
        ConfigError: if the certificate cannot be read.
    """
    path = folder / "server.crt"
    try:
        crt = x509.load_pem_x509_certificate(path.read_bytes())
        names = crt.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        raise ConfigError(f"{path} cannot be read as a certificate with hosts: {type(error).__name__}") from error
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def check_key(folder: Path, site: str) -> None:
    """Check that the key in a site's folder belongs to that site, as far as the folder names its owner.

    Raises:
        ConfigError: for a file that is missing or not a key, and for the key of another site.
    """
    for file in (folder / "ca.crt", folder / "key"):
        if not file.is_file():
            raise ConfigError(f"{file} is missing; --certificates is the folder that the server's side handed out")
    try:
        key = serialization.load_ssh_private_key((folder / "key").read_bytes(), None)
        words = (folder / "key.pub").read_bytes().split() if (folder / "key.pub").is_file() else []
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{folder / 'key'} is no secret key as ssh-keygen writes it: {type(error).__name__}"
        ) from error
    if words[:2] and words[:2] != _public(key).split():
        raise ConfigError(f"{folder / 'key'} and {folder / 'key.pub'} are not of one pair; get the folder again")
    owner = words[2].decode("utf-8", "replace") if len(words) > 2 else ""
    if owner.endswith(_MARK) and owner.removesuffix(_MARK) != site:
        raise ConfigError(
            f"{folder} holds the key of site {owner.removesuffix(_MARK)}, --name is {site}; they must be of one site"
        )


def owners(folder: Path, sites: Sequence[str]) -> dict[bytes, str]:
    """Return the owner of each public key `<site>.pub` in the server's folder.

    Returns:
        Key -> site; a key is PEM, as Flower stores that of a node.

    Raises:
        ConfigError: for a file that is missing or not a key, or two sites with one key.
    """
    sites_by_key: dict[bytes, str] = {}
    for site in sites:
        path = folder / f"{site}.pub"
        try:
            key = serialization.load_ssh_public_key(path.read_bytes())
        except FileNotFoundError as error:
            raise ConfigError(f"{path} is missing: make it with `consilium certificates`") from error
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{path} is no public key as ssh-keygen writes it: {type(error).__name__}") from error
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        if pem in sites_by_key:
            raise ConfigError(
                f"the sites {sites_by_key[pem]} and {site} have the same key; give every site a key of its own"
            )
        sites_by_key[pem] = site
    return sites_by_key


def _server_certificate(folder: Path, hosts: Sequence[str]) -> None:
    authority, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Consilium federation")])
    ca = (
        _certificate(issuer, issuer, authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(authority, hashes.SHA384())
    )
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *LOCAL))]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, (*hosts, "localhost")[0][:64])])
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    server = (
        _certificate(subject, issuer, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(identifier, critical=False)
        .sign(authority, hashes.SHA384())
    )
    write_atomic(folder / "ca.crt", ca.public_bytes(serialization.Encoding.PEM))
    write_atomic(folder / "server.crt", server.public_bytes(serialization.Encoding.PEM))
    _write_secret(folder / "server.key", _private(key, serialization.PrivateFormat.PKCS8))


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**dict.fromkeys(names, False) | allowed)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _parsed(host: str) -> str:
    parsed_host = parse_host(host, "--hosts", wildcard=True)
    if parsed_host in ("0.0.0.0", "::"):
        raise ConfigError(f"--hosts is {host!r}, which is no address under which a site reaches the server")
    return parsed_host


def _public(key: Any) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write_secret(path: Path, blob: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(blob)


# --- signatures -------------------------------------------------------------------------------------------------------


def site_key(folder: Path) -> Any:
    """Load the secret key in a site's folder, or create it if it is missing.

    The file is `key`, as `certificates` or ssh-keygen writes it.

    Raises:
        ConfigError: for a file that is not such a key.
    """
    path = folder / "key"
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        _write_secret(path, _private(key, serialization.PrivateFormat.OpenSSH))
        write_atomic(folder / "key.pub", _public(key) + b"\n")
        return key
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no secret key as ssh-keygen writes it: {type(error).__name__}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{path} is a {type(key).__name__}; allowed are keys of ssh-keygen -t ecdsa or ed25519")
    return key


def public_text(key: Any) -> str:
    """Return the public half of a secret key as one line in OpenSSH format."""
    return _public(key).decode()


def sign(key: Any, message: bytes) -> str:
    """Sign a message with a secret key, by ECDSA with SHA-384 or Ed25519, and return the signature in hex."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(message).hex()
    return key.sign(message, ec.ECDSA(hashes.SHA384())).hex()


def is_signed(public: str, signature: str, message: bytes) -> bool:
    """Return True if a signature (hex) of a message was made with the key of `public` (a line in OpenSSH format)."""
    try:
        key = serialization.load_ssh_public_key(public.encode())
        signature_bytes = bytes.fromhex(signature)
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature_bytes, message)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature_bytes, message, ec.ECDSA(hashes.SHA384()))
        else:
            return False
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        return False
    return True
