"""Make a consortium's kits from consortium.toml, and later add what is missing in them.

This is ``fedbags provision``. Faults of the settings and of the folder are found before anything is written.
Keys, certificates and the app are never overwritten.
"""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import UserError
from common.pki import read_node_key
from deploy.consortium.app import build_bundle
from deploy.consortium.authority import Authority
from deploy.consortium.kit import KIT_FILE, CoordinatorKit, app_hash
from deploy.consortium.kits import Changes, Kits, make_node_key, render_kit, write_flower_connection
from deploy.consortium.pki import (
    KeyForm,
    certified_hosts,
    fingerprint,
    make_private_key,
    make_secret,
    read_certificate,
    read_public_key,
    require_private,
)
from deploy.consortium.settings import ConsortiumSettings, SitePorts


def provision(
    settings_file: Path,
    out: Path,
    *,
    password: bytes | None = None,
    keys_here: bool = False,
    update: bool = False,
) -> Changes:
    """Make the kits of a consortium, or add what is missing to those that are there.

    Sites that were added by ``add_site`` stay, although consortium.toml does not name them.

    Args:
        settings_file: consortium.toml.
        out: the folder of kits.
        password: of the authority's key, if it has or is to have one.
        keys_here: make the sites' private keys here too (trials on one machine).
        update: write kit.toml and all that is rendered again from the settings; keys and app stay.

    Raises:
        UserError: faulty settings or keys, or kits that were made from other settings or changed halfway.
    """
    settings = ConsortiumSettings.load(settings_file)
    # Read before the folder is opened, which makes a new authority: a faulty key leaves nothing written.
    keys = _public_keys(settings, settings_file.parent)
    kits, app = _open(settings, out, password, update)
    _complete_coordinator(kits, app, update)
    for name, site in settings.sites.items():
        ports = SitePorts.model_validate(site.model_dump(include=set(SitePorts.model_fields)))
        kit = kits.complete_site(name, ports, keys_here=keys_here, update=update)
        key = keys.get(name)
        if key is None and keys_here:
            if not kit.node_key.exists():
                kits.changes.written.append(make_node_key(kit))
            key = read_node_key(kit.node_key).public_key()
            require_private(kit.node_key)
        if key is not None:
            kits.register(name, key, kits.coordinator.certificate_days)
    return kits.finished()


def _public_keys(settings: ConsortiumSettings, folder: Path) -> dict[str, ec.EllipticCurvePublicKey]:
    keys = {
        name: read_public_key(folder / Path(site.public_key).expanduser())
        for name, site in settings.sites.items()
        if site.public_key
    }
    first: dict[str, str] = {}
    for name, key in keys.items():
        if (other := first.setdefault(fingerprint(key), name)) != name:
            raise UserError(
                f"sites {other!r} and {name!r} have one key: each site makes its own with `fedbags site "
                "keygen`"
            )
    return keys


def _open(
    settings: ConsortiumSettings, out: Path, password: bytes | None, update: bool
) -> tuple[Kits, bytes]:
    folder = out / "coordinator"
    if not (out / "authority").exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(
                f"{out} is not empty and has no authority folder. Give an empty folder for a new "
                "consortium, or bring back the authority folder of these kits (you keep it offline)."
            )
        app = build_bundle()
        days = settings.validity.authority_days
        authority = Authority.create(out / "authority", settings.name, days, password)
    else:
        authority = Authority.open(out / "authority", password)
        stored = folder / "app" / "fedbags.fab"
        # The app stays what it was, even after an upgrade of fedbags: its hash is what the sites approved.
        app = stored.read_bytes() if stored.is_file() else build_bundle()
    wanted = CoordinatorKit(
        consortium=settings.name,
        app_hash=app_hash(app),
        sites=tuple(settings.sites),
        certificate_days=settings.validity.certificate_days,
        server=settings.server,
    ).at(folder)
    if authority.consortium != settings.name:
        raise UserError(
            f"{out} has the kits of consortium {authority.consortium!r}, and the settings are of "
            f"{settings.name!r}: give another folder"
        )
    if (folder / KIT_FILE).exists():
        found = CoordinatorKit.load(folder)
        Kits(out, authority, found).check_consistent()
        # Sites were given the old address in their kits, so a change of it has to be meant.
        if found.server != wanted.server and not update:
            raise UserError(
                f"{folder / KIT_FILE} was made from other settings: {_differences(found, wanted)}. Give "
                "--update "
                "to take over the new ones (keys stay; sites whose server changes need their new kit.toml)."
            )
        wanted = wanted.model_copy(update={"sites": tuple(dict.fromkeys((*found.sites, *wanted.sites)))})
    return Kits(out, authority, wanted), app


def _differences(found: CoordinatorKit, wanted: CoordinatorKit) -> str:
    old, new = (kit.server.model_dump(mode="json", by_alias=True) for kit in (found, wanted))
    return ", ".join(
        f"server.{key} was {old[key]!r} and is {new[key]!r}" for key in new if old[key] != new[key]
    )


def _complete_coordinator(kits: Kits, app: bytes, update: bool) -> None:
    kit, written = kits.coordinator, kits.changes.written
    kit.nodes.mkdir(parents=True, exist_ok=True)
    kit.folder.chmod(0o700)
    kits.complete_common(kit, app)
    if not kit.server_key.exists():
        make_private_key(kit.server_key, KeyForm.PKCS8)
        written.append(kit.server_key)
    if not kit.server_certificate.exists() or (
        update
        and certified_hosts(read_certificate(kit.server_certificate)) != set(kit.server.certificate_hosts)
    ):
        kits.certify_server(kit.certificate_days)
    if not kit.superexec_secret.exists():
        make_secret(kit.superexec_secret)
        written.append(kit.superexec_secret)
    if update or not (kit.flower_home / "config.toml").exists():
        written.append(write_flower_connection(kit))
    written += render_kit(kit, update=update)
    if not (kit.folder / KIT_FILE).exists() or CoordinatorKit.load(kit.folder) != kit:
        kit.save()
        written.append(kit.folder / KIT_FILE)
