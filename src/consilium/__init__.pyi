"""What `import consilium` gives, for type checkers; at run time __init__.py imports it when it is used."""

from consilium import recipes as recipes
from consilium.algorithms.affinitymoe import AffinityMoE as AffinityMoE
from consilium.algorithms.fd import FD as FD
from consilium.algorithms.fedapen import FedAPEN as FedAPEN
from consilium.algorithms.fedavg import FedAvg as FedAvg
from consilium.algorithms.fedgh import FedGH as FedGH
from consilium.algorithms.fedkd import FedKD as FedKD
from consilium.algorithms.fedmoe import FedMoE as FedMoE
from consilium.algorithms.fedmrl import FedMRL as FedMRL
from consilium.algorithms.fedproto import FedProto as FedProto
from consilium.algorithms.fedprox import FedProx as FedProx
from consilium.algorithms.fedssa import FedSSA as FedSSA
from consilium.algorithms.fedtgp import FedTGP as FedTGP
from consilium.algorithms.fml import FML as FML
from consilium.algorithms.hfedmoe import HFedMoE as HFedMoE
from consilium.algorithms.lgfedavg import LGFedAvg as LGFedAvg
from consilium.algorithms.pfedmoe import pFedMoE as pFedMoE
from consilium.algorithms.randommoe import RandomMoE as RandomMoE
from consilium.algorithms.scaffold import SCAFFOLD as SCAFFOLD
from consilium.algorithms.standalone import Standalone as Standalone
from consilium.api import Run as Run
from consilium.api import compare as compare
from consilium.api import load_run as load_run
from consilium.core import Algorithm as Algorithm
from consilium.core import Client as Client
from consilium.core import ClientInfo as ClientInfo
from consilium.core import Payload as Payload
from consilium.core import Sampling as Sampling
from consilium.core import Server as Server
from consilium.core import setting as setting
from consilium.data.arrays import ImageData as ImageData
from consilium.data.arrays import TableData as TableData
from consilium.data.code import CodeData as CodeData
from consilium.data.docstrings import DocstringData as DocstringData
from consilium.data.language import LanguageData as LanguageData
from consilium.data.textfile import TextFileData as TextFileData
from consilium.errors import ConsiliumError as ConsiliumError
from consilium.experiment import Experiment as Experiment
from consilium.models.cohort import Cohort as Cohort
from consilium.moe.build import ModelSource as ModelSource
from consilium.moe.surgery import slice_experts as slice_experts
from consilium.run import resume as resume
from consilium.run import run as run
from consilium.setup import Fit as Fit

__version__: str
