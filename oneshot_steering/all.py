"Everything a notebook needs, in one import: `from oneshot_steering.all import *`. Inner names stay in their modules."

from oneshot_steering.baselines import (
    NoDirection,
    Prompted,
    RefusalCandidates,
    RefusalDirection,
    Selection,
    caa,
    few_shot,
    pca_direction,
    prefill,
    random_like,
    refusal_direction,
    states_of,
)
from oneshot_steering.calibrate import (
    Budget,
    Calibration,
    calibrate,
    mean_score,
    strength_curve,
)
from oneshot_steering.datasets import (
    OPEN_QUESTIONS,
    data_folder,
    everyday_questions,
    fictitious_prompts,
    load_harmbench,
    load_instructions,
    load_poser,
    mild_requests,
    neutral_name,
    neutral_texts,
    open_questions,
    swap_options,
    without_name,
)
from oneshot_steering.evaluate import (
    REFUSALS,
    RETRACTIONS,
    UNSTEERED,
    Choice,
    Contains,
    Expected,
    Readable,
    RefusalOdds,
    compare,
    flip_rates,
    flip_table,
    misalignment,
    rates,
    side_effects,
)
from oneshot_steering.export import (
    bake,
    hookpoints,
    to_llama_cpp,
    to_lm_eval,
)
from oneshot_steering.figure import (
    StaticFigure,
    steering_figure,
)
from oneshot_steering.gate import Gate, fit_gate, separating_direction
from oneshot_steering.geometry import (
    Classifier,
    Connectivity,
    Overlap,
    Projections,
    auc_interval,
    classify,
    cosine_summary,
    cosines,
    effective_dimension,
    mode_connectivity,
    projections,
    subspace_basis,
    subspace_overlap,
)
from oneshot_steering.judges import (
    ALIGNED,
    COHERENT,
    HARMFUL,
    Grade,
    Judge,
    LMJudge,
    OpenAIJudge,
    Verdict,
    YesNo,
)
from oneshot_steering.lm import (
    LM,
    Pair,
    Progress,
    Sampling,
    TokenPositions,
)
from oneshot_steering.metrics import (
    LANGUAGES,
    bootstrap,
    language_of,
    language_share,
    perplexity,
    repetition,
    rounded,
    wilson,
    words_of,
)
from oneshot_steering.models import (
    embedded_path,
    fast_dtype,
    load_lm,
    tiny_lm,
    tiny_model,
    tiny_tokenizer,
)
from oneshot_steering.next_token import (
    choose,
    log_odds,
)
from oneshot_steering.objective import (
    Example,
    Objective,
    Shift,
    Term,
    Terms,
    to_hartleys,
)
from oneshot_steering.optimize import (
    Affine,
    Constraints,
    Fit,
    Job,
    Noise,
    Refine,
    Retain,
    Stop,
    optimize,
    optimize_many,
)
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
from oneshot_steering.panel import (
    optimizer_panel,
)
from oneshot_steering.plot import (
    COLORS,
    PAPER_FLIPS,
    new_axes,
    plot_claims,
    plot_fit,
    plot_flips,
    plot_judged,
    plot_layers,
    plot_matrix,
    plot_refusals,
    plot_roc,
    plot_strengths,
    plot_success,
    plot_surprisal,
    plot_text,
    plot_tokens,
)
from oneshot_steering.products import (
    onednn_products,
)
from oneshot_steering.recipes import (
    Reentrant,
    geodesic,
    label_free_scores,
    match_reference,
    melbo,
    reentrant,
    satisfice_to,
    swapped_choice,
    total_losses,
)
from oneshot_steering.slider import (
    steering_slider,
)
from oneshot_steering.steering import (
    NEUTRAL_PROMPTS,
    Steering,
    Steerings,
    as_steerings,
    load_steering,
)
from oneshot_steering.study import (
    CLAIM_COLUMNS,
    Estimate,
    Study,
    claims_table,
    classifier_of,
    describe_fit,
    load_judge,
    load_model,
    median_over,
    of_row,
    read_claims,
    share,
    spread_over_examples,
)
from oneshot_steering.surprisal import (
    Surprisal,
    complexity,
    in_context,
    plain_text,
    surprisal,
    turn_end,
)
