"""The same methods on Flower: payloads as Flower's messages, its simulation runtime, its deployments.

    records   a payload as a message's content, bit for bit
    roster    the clients behind Flower's nodes, by name or by key
    patience  a Grid that retries while its server fails
    grid      the engine: rounds over a Grid, deadlines, missing clients
    held      the weights that a client holds, where only changes are sent to it
    client    the client's end, a ClientApp
    site      the files that a site of a deployment keeps
    offered   a file that a site hands over in pieces
    limits    the most that a server may ask of a site
    server    the server's end: a Grid from the simulation runtime or a deployment

Nothing outside this package imports flwr.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # flwr reads both when it is imported
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from consilium.engine.flower.client import DELIVERED, OWN, client_app
from consilium.engine.flower.grid import FlowerEngine
from consilium.engine.flower.limits import Limits
from consilium.engine.flower.offered import PIECE, save_offer
from consilium.engine.flower.records import PROTOCOL
from consilium.engine.flower.roster import Roster, ask, failed
from consilium.engine.flower.server import describe, one_cohort, server_app, simulation
from consilium.engine.flower.site import read_site, relabelled, save_site

__all__ = [
    "DELIVERED",
    "OWN",
    "PIECE",
    "PROTOCOL",
    "FlowerEngine",
    "Limits",
    "Roster",
    "ask",
    "client_app",
    "describe",
    "failed",
    "one_cohort",
    "read_site",
    "relabelled",
    "save_offer",
    "save_site",
    "server_app",
    "simulation",
]
