"""What docs/deployment.md says, executed: keys, a server and three sites as processes on loopback."""

import io
import json
import os
import re
import ssl
import stat
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import tables
import tiny
from deployments import Deployment, free_port
from processes import until
from rich.console import Console
from transformers import SwitchTransformersEncoderModel

from consilium.__main__ import main
from consilium.export.deployed import Finished, delivered, of_run, of_site

pytest.importorskip("flwr")
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from consilium import deployment
from consilium.certificates import certificates, certified, check_key, owners
from consilium.errors import ConfigError, RoundError
from consilium.experiment import to_json
from consilium.loop import run

PAGE = Path(__file__).parent.parent / "docs/deployment.md"
COMMANDS = re.findall(r"^```bash\nconsilium (.*?)\n```", PAGE.read_text(), re.M | re.S)
SMALL = "--data.train 24 --data.validation 8 --data.test 8"
MINUTES = 60 * float(os.environ.get("CONSILIUM_TEST_PATIENCE", "1"))


def test_the_page_has_the_commands_that_are_executed():
    assert [command.split()[0] for command in COMMANDS] == [
        "certificates",
        "server",
        "client",
        "client",
        "client",
        "export",
    ]


def late(port, ca):
    """Whether the server is there and tells a site whose clock is an hour off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployment.time, "time", lambda real=time.time: real() - 3600)
        try:
            deployment.in_time(f"localhost:{port}", ca)
        except ConfigError as error:
            return re.search(r"is 3[56]\d\d s behind that of localhost:\d+; .* allows 300", str(error))


def test_three_sites_as_the_page_has_it(tmp_path, monkeypatch):
    """FedMoE on the documentation, three tasks, three memories, three sub-MoEs, TLS, keys; a stranger is refused. Then
    each site exports its own model, and plain transformers loads it."""
    with Deployment(tmp_path) as there:
        keys, server, *clients, export = (
            command.replace("localhost:8000", f"localhost:{there.port}") for command in COMMANDS
        )
        process, _ = there.start(keys)
        there.finished(process, 3 * MINUTES)
        serving, _ = there.start(f"{server.replace('0.0.0.0:8000', f'127.0.0.1:{there.port}')} --wait 3000 {SMALL}")
        for command in clients:
            there.start(f"{command} --port {free_port()} {SMALL}")
        certificates(tmp_path / "others", [], ["east"])  # a key that the server does not know
        (tmp_path / "others/east/ca.crt").write_bytes((tmp_path / "keys/north/ca.crt").read_bytes())
        stranger, refused = there.start(
            f"{clients[0].replace('north', 'east').replace('keys/', 'others/')} --port {free_port()} {SMALL}"
        )
        until(lambda: late(there.port, tmp_path / "keys/north/ca.crt"), 3 * MINUTES, "the server's time", serving)
        there.finished(serving, 5 * MINUTES)
        assert "Failed to initialize the connection to the SuperLink" in refused.read_text(), stranger.poll()
    folder = tmp_path / "runs/fedmoe-docstrings"
    outcome = runs.outcome(folder)
    assert outcome["status"] == "finished" and len(outcome["metrics"]) == 2
    assert [m["missing"] for m in outcome["metrics"]] == [{}, {}] == [m["untested"] for m in outcome["metrics"]]
    assert outcome["metrics"][1]["selected"] == ["north", "south", "west"] == list(outcome["metrics"][1]["test"])
    held = list(outcome["structure"]["rounds"].values())[-1]
    assert len({json.dumps(blocks) for blocks in held.values()}) == 3
    assert {c: told["memory_bytes"] for c, told in outcome["partition"]["clients"].items()} == {
        "north": 160 * 10**6, "south": 126 * 10**6, "west": 95 * 10**6
    }  # fmt: skip
    assert not re.search(r"rows|label_counts", json.dumps(outcome["partition"]))
    assert (folder / "report.html").exists()
    assert stat.S_IMODE((tmp_path / "north/data.json").stat().st_mode) == 0o600
    monkeypatch.chdir(tmp_path)
    for site in ("north", "south", "west"):
        assert main(export.replace("north", site).split()) == 0
        model, said = SwitchTransformersEncoderModel.from_pretrained(f"{site}-model", output_loading_info=True)
        assert not any(said.values()) and model.config.num_experts == max(map(len, held[site].values()))
        assert tiny.same(of_site(*delivered(tmp_path / site)).params, of_run(Finished.of(folder), site).params)
        assert f"{outcome['metrics'][1]['test'][site]:.3f} on its own" in Path(f"{site}-model/README.md").read_text()
        assert json.loads(Path(f"{site}-model/labels.json").read_text()).keys() == {
            outcome["partition"]["clients"][site]["task"]
        }


@pytest.mark.slow
def test_small_models_of_three_sites_and_one_that_lies(tmp_path):
    """pFedMoE, every site with its own table and architecture: the bits of one machine. West's key under east's name is
    refused, and nobody's place is taken; the run goes on with west itself."""
    made = tables.experiment(tables.written(tmp_path))
    (tmp_path / "experiment.json").write_text(json.dumps(to_json(made)))
    certificates(tmp_path / "keys", [], tables.NAMES)
    (tmp_path / "keys/west/key.pub").unlink()  # by which the liar's own client would refuse it

    def own(site):
        return ["experiment.json", "--data.path", f"{site}/ill.csv", "--model.architectures", tables.CHOSEN[site]]

    with Deployment(tmp_path) as there:
        serving, log = there.server("experiment.json", sites=tables.NAMES)
        where = ["--server", f"127.0.0.1:{there.port}", "--state", "liar", "--port", free_port()]
        liar, _ = there.start(["client", *own("west"), "--name", "east", "--certificates", "keys/west", *where])
        for site in ("east", "north"):
            there.client(*own(site), name=site)
        until(lambda: "says that it is east, with west's key" in log.read_text(), 5 * MINUTES, "it is refused", log=log)
        liar.family.end()
        there.client(*own("west"), name="west")
        there.finished(serving, 5 * MINUTES)
    run(made, tmp_path / "local")
    over, local = runs.bits(tmp_path / "runs/short"), runs.bits(tmp_path / "local")
    assert over["summary"]["weights"] == local["summary"]["weights"]
    assert [m["test"] for m in over["metrics"]] == [m["test"] for m in local["metrics"]]
    assert [m["missing"] for m in over["metrics"]] == [{}, {}]
    assert {c: told["architecture"] for c, told in over["partition"]["clients"].items()} == tables.CHOSEN
    (event,) = [event for event in over["events"] if event["event"] == "refused"]
    assert (event["client"], event["round"]) == ("west", 1) and "that it is east" in event["reason"]


# --- keys ---------------------------------------------------------------------------------------------------------


def test_keys_are_what_flower_reads_and_secret(tmp_path):
    assert certificates(tmp_path, ["10.0.0.7", "fed.example.org"], ["north"]) == [tmp_path / "north"]
    key = serialization.load_ssh_private_key((tmp_path / "north/key").read_bytes(), None)
    public = serialization.load_ssh_public_key((tmp_path / "server/north.pub").read_bytes())
    assert isinstance(key.curve, ec.SECP384R1) and key.public_key() == public
    for secret in ("north/key", "server/server.key"):
        assert stat.S_IMODE((tmp_path / secret).stat().st_mode) == 0o600
    crt = x509.load_pem_x509_certificate((tmp_path / "server/server.crt").read_bytes())
    authority = x509.load_pem_x509_certificate((tmp_path / "north/ca.crt").read_bytes())
    crt.verify_directly_issued_by(authority)
    names = crt.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1", "::1"]
    assert not list(tmp_path.rglob("ca.key"))


def test_whose_a_key_is(tmp_path):
    """As Flower has it of a node; no two sites with one key, nothing that is no key."""
    certificates(tmp_path, [], ["north", "south"])
    found = owners(tmp_path / "server", ["north", "south"])
    for site in ("north", "south"):
        key = serialization.load_ssh_private_key((tmp_path / site / "key").read_bytes(), None)
        assert found[public_key_to_bytes(key.public_key())] == site
    (tmp_path / "server/west.pub").write_bytes((tmp_path / "server/north.pub").read_bytes())
    (tmp_path / "server/east.pub").write_text("ssh-rsa nothing")
    for site, said in (("west", "north and west have the same key"), ("east", "is no public key"), ("x", "is missing")):
        with pytest.raises(ConfigError, match=said):
            owners(tmp_path / "server", ["north", "south", site])


def test_more_sites_leave_what_is_there(tmp_path):
    certificates(tmp_path, [], ["north"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert certificates(tmp_path, [], ["north", "south"]) == [tmp_path / "south"]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["server", "../x", "", ".hidden"])
def test_names_that_are_no_sites(tmp_path, name):
    with pytest.raises(ConfigError, match="site"):
        certificates(tmp_path, [], [name])
    assert not list(tmp_path.iterdir())


# --- what is refused before anything starts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("server fedmoe-docstrings --sites a,b", "--certificates is missing"),
        ("server fedmoe-docstrings --certificates keys", "--sites is empty"),
        ("server fedmoe-docstrings --sites a,a --certificates k", "names a site twice"),
        ("server fedmoe-docstrings --sites a --insecure", "0.0.0.0 is not this machine"),
        ("server fedmoe-docstrings --sites a --certificates nowhere", "a.pub is missing"),
        ("client fedmoe-docstrings --name a --server 10.0.0.7:8000 --insecure", "10.0.0.7 is not this machine"),
        ("client fedmoe-docstrings --name a --server 10.0.0.7", "it must be HOST:PORT"),
        (
            "client fedmoe-docstrings --name a --server 10.0.0.7:1 --certificates k --max-lr x",
            "--max-lr is 'x'; it must",
        ),
        ("client fedmoe-docstrings --name a --server 10.0.0.7:1 --certificates k --max-steps 0", "--max-steps is '0'"),
        ("client fedmoe-docstrings --name a --server 10.0.0.7:1 --certificates k --max-bytes 9q", "size '9q' is no"),
        ("certificates keys --sites a/b", "--sites names 'a/b'"),
    ],
)
def test_refused_in_one_line(arguments, said, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    error = capfd.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1


FLWR = """#!{python}
import sys
from pathlib import Path
folder, does = Path({folder!r}), {does!r}
calls = folder / "calls"
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
what = does[len(calls.read_text()) - 1]
if what == "round":
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / f"round-{{len(calls.read_text()):05d}}.safetensors").touch()
if what == "error":
    (folder.parent / "run.flower/stopped").touch()
if what == "finish":
    (folder / "config.json").write_text('{{"experiment": {{}}, "status": "finished"}}')
"""


@pytest.mark.parametrize(
    ("does", "finishes"),
    [(["finish"], True), (["killed"] * 5 + ["finish"], True), (["killed"] * 6, False), (["killed", "error"], False),
     (["killed"] * 5 + ["round"] + ["killed"] * 5 + ["finish"], True)],
    ids=["well", "killed five times", "killed six times", "ended by itself", "killed again after a round"],
)  # fmt: skip
def test_what_was_killed_is_started_again(does, finishes, tmp_path, monkeypatch, caplog):
    """A program in place of Flower's that ends as if killed, after a round or before one, or as the run's own error."""
    (folder := tmp_path / "run").mkdir()
    flwr = tmp_path / "flwr"
    flwr.write_text(FLWR.format(python=sys.executable, folder=str(folder), does=does))
    flwr.chmod(0o755)
    link = SimpleNamespace(poll=lambda: None)
    monkeypatch.setattr(deployment, "program", lambda _: str(flwr))
    monkeypatch.setattr(deployment, "_superlink", lambda *_: nullcontext(link))
    monkeypatch.setattr(deployment.time, "sleep", lambda _, real=deployment.time.sleep: real(0.01))
    made, out = runs.experiment(tmp_path / "none"), Console(file=io.StringIO())
    with nullcontext() if finishes else pytest.raises(RoundError, match="the same command goes on with"):
        deployment.server(made, folder, ["a"], "127.0.0.1:9", None, 1.0, out)
    assert len((folder / "calls").read_text()) == len(does)
    assert caplog.text.count("starting them again") == len(does) - 1


@pytest.mark.parametrize(
    ("headers", "ca", "says"),
    [
        ({"Date": 0}, "ours", None),
        ({"Date": -280}, "ours", None),
        ({"Date": -400}, "ours", r"(399|40\d) s ahead of"),
        ({"Date": 4000}, "ours", r"(399\d|4000) s behind"),
        ({}, "ours", None),
        ({"Date": "yesterday"}, "ours", None),
        ({"Date": 0}, "others", r"certificate of localhost:\d+ is refused \(.*issuer.*\): .*ca.crt is another"),
    ],
)
def test_a_site_asks_for_the_time(tmp_path, headers, ca, says):
    """A server that is not there is waited for; one with another clock, or another certificate, is not."""
    for name in ("ours", "others"):
        certificates(tmp_path / name, ["localhost"], ["site"])

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response_only(404)
            for key, value in headers.items():
                self.send_header(key, formatdate(time.time() + value, usegmt=True) if value != "yesterday" else value)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "ours/server/server.crt", tmp_path / "ours/server/server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address, file = f"localhost:{server.server_port}", tmp_path / ca / "site/ca.crt"
        try:
            with pytest.raises(ConfigError, match=says) if says else nullcontext():
                deployment.in_time(address, file)
        finally:
            server.shutdown()
            thread.join()
    deployment.in_time(address, file)
    file.write_text("no certificate")
    with pytest.raises(ConfigError, match=r"ca\.crt cannot be read as a certificate: "):
        deployment.in_time(address, file)


@pytest.mark.parametrize(
    ("hosts", "names", "numbers"),
    [
        ("fed.example.org, 10.0.0.5", ["fed.example.org"], ["10.0.0.5"]),
        ("fed.example.org;10.0.0.5", ["fed.example.org"], ["10.0.0.5"]),
        ("[2001:db8::5]", [], ["2001:db8::5"]),
        ("München.example.org,*.Example.org", ["xn--mnchen-3ya.example.org", "*.example.org"], []),
        ("10.0.0.5:8000", "without a port", None),
        ("https://fed.example.org", "no URL", None),
        ("0.0.0.0", "no address under which a site reaches", None),
    ],
)
def test_hosts_of_a_certificate_as_people_write_them(hosts, names, numbers, tmp_path, capfd):
    """They are understood, or refused before anything is written."""
    code = main(["certificates", str(tmp_path / "keys"), "--sites", "north", "--hosts", hosts])
    if numbers is None:
        assert code == 2 and names in capfd.readouterr().err and not (tmp_path / "keys").exists()
        return
    assert code == 0
    crt = x509.load_pem_x509_certificate((tmp_path / "keys/server/server.crt").read_bytes())
    found = crt.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.DNSName) == [*names, "localhost"]
    assert [str(ip) for ip in found.get_values_for_type(x509.IPAddress)] == [*numbers, "127.0.0.1", "::1"]


def test_another_list_of_hosts_makes_another_certificate(tmp_path, capfd):
    """And says what to send to the sites, whose keys stay; the same list in another order changes nothing."""
    command = ["certificates", str(tmp_path), "--sites", "north", "--hosts"]
    assert main([*command, "a.org,10.0.0.5"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for same in ("10.0.0.5, A.org", "localhost;a.org;10.0.0.5"):
        assert main([*command, same]) == 0
    assert main(command[:-1]) == 0
    assert {path: path.read_bytes() for path in before} == before and "another" not in capfd.readouterr().err
    assert main([*command, "b.org"]) == 0
    assert "the list of hosts is another" in (said := capfd.readouterr().err) and "every site" in said
    assert certified(tmp_path / "server")[0] == "b.org"
    authority = x509.load_pem_x509_certificate((tmp_path / "north/ca.crt").read_bytes())
    x509.load_pem_x509_certificate((tmp_path / "server/server.crt").read_bytes()).verify_directly_issued_by(authority)
    assert (tmp_path / "north/key").read_bytes() == before[tmp_path / "north/key"]


def test_a_site_checks_its_own_key_first(tmp_path, monkeypatch, capfd):
    certificates(tmp_path, [], ["north", "west"])
    check_key(tmp_path / "north", "north")
    with pytest.raises(ConfigError, match="holds the key of site north, --name is west"):
        check_key(tmp_path / "north", "west")
    monkeypatch.chdir(tmp_path)
    assert (
        main(["client", "fedmoe-docstrings", "--name", "west", "--server", "localhost:9", "--certificates", "north"])
        == 2
    )
    assert "holds the key of site north" in capfd.readouterr().err and not (tmp_path / "site-west").exists()
    (tmp_path / "north/key.pub").write_bytes((tmp_path / "west/key.pub").read_bytes())
    with pytest.raises(ConfigError, match="not of one pair"):
        check_key(tmp_path / "north", "north")
    (tmp_path / "north/key.pub").write_bytes(b"")
    check_key(tmp_path / "north", "north")  # a key that says no name, as of ssh-keygen
    (tmp_path / "north/key").write_text("nothing")
    with pytest.raises(ConfigError, match="is no secret key"):
        check_key(tmp_path / "north", "north")


def test_a_server_listens_on_an_address_of_its_certificate(tmp_path):
    """Flower's own processes come under the address that the server listens on, and check the certificate."""
    certificates(tmp_path, ["10.0.0.5", "*.example.org"], ["a"])
    for host in ("0.0.0.0", "::", "::1", "localhost", "10.0.0.5", "fed.example.org"):
        deployment._check_certificate(tmp_path / "server", deployment.Address(host, 1))
    for host in ("127.0.0.2", "example.org", "a.b.example.org"):
        with pytest.raises(ConfigError, match="make it again with `consilium certificates` and --hosts"):
            deployment._check_certificate(tmp_path / "server", deployment.Address(host, 1))


def test_a_finished_run_takes_no_other_settings(tmp_path, monkeypatch):
    """Before Flower is started: other settings and more rounds are refused, the same are said to be finished."""
    monkeypatch.setattr(deployment, "_superlink", lambda *_: pytest.fail("Flower was started"))
    made, out, folder = runs.experiment(tmp_path / "none"), Console(file=io.StringIO()), tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"experiment": to_json(made), "status": "finished"}))

    def serve(**changes):
        deployment.server(replace(made, **changes), folder, ["a"], "127.0.0.1:9", None, 1.0, out)

    serve()
    assert "run is finished" in " ".join(out.file.getvalue().split())
    with pytest.raises(ConfigError, match=rf"is finished after {made.rounds} rounds and does not go on to 99"):
        serve(rounds=99)
    with pytest.raises(ConfigError, match=r"holds another experiment \(seed was 0, is 7\)"):
        serve(seed=7)
    (folder / "config.json").write_text(json.dumps({"experiment": to_json(made), "status": "interrupted"}))
    with pytest.raises(ConfigError, match=r"holds another experiment \(seed was 0, is 7\)"):
        serve(seed=7, rounds=99)


def test_a_site_has_one_client_unless_it_says_otherwise(tmp_path, monkeypatch, capfd):
    seen = []
    monkeypatch.setattr(deployment, "client", lambda experiment, *_: seen.append(experiment.data))
    command = "client {} --name a --server localhost:9 --insecure {}"
    for recipe, more in (
        ("fedmoe-docstrings", "--data.tasks topic"),
        ("pfedmoe-images", ""),
        ("fedmoe-text", ""),
        ("pfedmoe-images", "--data.clients 3"),
    ):
        assert main(command.format(recipe, more).split()) == 0, capfd.readouterr().err
    assert [data.clients for data in seen] == [1, 1, 1, 3] and seen[1].partition == "iid"
