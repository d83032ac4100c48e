"Everything a notebook needs, in one import: `from oneshot_steering.all import *`."

from oneshot_steering.baselines import *
from oneshot_steering.calibrate import *
from oneshot_steering.datasets import *
from oneshot_steering.evaluate import *
from oneshot_steering.export import *
from oneshot_steering.files import *
from oneshot_steering.figure import *
from oneshot_steering.geometry import *
from oneshot_steering.judges import *
from oneshot_steering.lm import *
from oneshot_steering.metrics import *
from oneshot_steering.models import *
from oneshot_steering.next_token import *
from oneshot_steering.objective import *
from oneshot_steering.optimize import *
from oneshot_steering.organisms import (
    ORGANISMS,
    Organism,
    Recipe,
    load_organism,
    organism,
    organism_figures,
    train_organism,
    without_adapter,
)
from oneshot_steering.panel import *
from oneshot_steering.plot import *
from oneshot_steering.products import *
from oneshot_steering.recipes import *
from oneshot_steering.reuse import *
from oneshot_steering.slider import *
from oneshot_steering.steering import *
from oneshot_steering.study import *
from oneshot_steering.surprisal import *
from oneshot_steering.widget_base import *
