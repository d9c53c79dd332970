"""Content Credentials of files that the tests sign themselves, and of files without any."""

import datetime
import importlib.util
import io
import json

import pytest
from conftest import smooth_picture
from PIL import Image

from featdistill.command_line import UserError
from featdistill.images.credentials import Credentials, read_credentials

MISSING = [name for name in ("c2pa", "cryptography") if importlib.util.find_spec(name) is None]
needs_package = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
AI = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def jpeg(seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(smooth_picture(seed)).save(file, "JPEG", quality=90)
    return file.getvalue()


def signed(data: bytes, source: str) -> bytes:
    """Return a JPEG with a manifest, signed by a certificate of an authority made for it."""
    import c2pa
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now, pem = datetime.datetime.now(datetime.UTC), serialization.Encoding.PEM
    names = [x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)]) for name in ("Root", "Signer")]
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in names]
    chain = b""
    for name, key, is_authority in zip(names, keys, (True, False), strict=True):
        usages = {name: False for name in ("content_commitment", "key_encipherment", "data_encipherment")}
        usages |= {"key_agreement": False, "encipher_only": False, "decipher_only": False}
        usages |= {"key_cert_sign": is_authority, "crl_sign": is_authority}
        usages["digital_signature"] = not is_authority
        built = (
            x509.CertificateBuilder(names[0], name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(x509.KeyUsage(**usages), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False
            )
        )
        if not is_authority:
            purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            built = built.add_extension(purposes, critical=False)
        chain = built.sign(keys[0], hashes.SHA256()).public_bytes(pem) + chain
    private = keys[1].private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    actions = [{"action": "c2pa.created", "digitalSourceType": source}, {"action": "c2pa.color_adjustments"}]
    manifest = {
        "claim_generator_info": [{"name": "Test Painter", "version": "1.0"}],
        "assertions": [{"label": "c2pa.actions", "data": {"actions": actions}}],
    }
    out = io.BytesIO()
    signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(b"es256", chain, private, None))
    c2pa.Builder(json.dumps(manifest)).sign(signer, "image/jpeg", io.BytesIO(data), out)
    return out.getvalue()


@needs_package
def test_a_signed_file_tells_who_signed_what_made_it_and_what_was_done():
    found = read_credentials(signed(jpeg(), AI))
    actions = ("created", "color_adjustments")
    assert found == Credentials("valid", "Signer", "Test Painter 1.0", actions, True)
    assert found.sentence() == (
        "The Content Credentials are validly signed by Signer; who that is was not checked. They state that "
        "the image is AI-generated. Written by Test Painter 1.0. Actions: created, color adjustments."
    )
    camera = read_credentials(signed(jpeg(), AI.replace("trainedAlgorithmicMedia", "digitalCapture")))
    assert camera.signature == "valid" and not camera.states_ai


@needs_package
def test_a_changed_file_has_an_invalid_signature():
    data = bytearray(signed(jpeg(), AI))
    data[-60] ^= 0x55
    found = read_credentials(bytes(data))
    assert found.signature == "invalid" and found.problems and "not valid" in found.sentence()


@needs_package
@pytest.mark.parametrize("data", [jpeg(), b"no image", b""], ids=["unsigned", "no image", "empty"])
def test_a_file_without_a_manifest_has_none(data):
    assert read_credentials(data) == Credentials("none")
    assert read_credentials(data).sentence() == "The file has no Content Credentials."


def test_a_missing_package_is_one_line_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="c2pa-python; run pip install c2pa-python"):
        read_credentials(jpeg())
