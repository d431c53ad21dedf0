"""Linear mixed models on any table: `relseek_assets.mixed_models` under the name under which those who work with trials look for it.

Here belongs nothing of its own. An example, 40 people seen at four weeks each:

    >>> import numpy as np, pandas as pd
    >>> from relseek_assets.trials import lmm
    >>> draw = np.random.default_rng(1)
    >>> person, week = np.repeat(np.arange(40), 4), np.tile([1, 2, 3, 4], 40)
    >>> arm = pd.Categorical(np.where(person % 2, "treated", "control"))
    >>> score = 50 + 3 * (person % 2) + draw.normal(0, 4, 40)[person] + (0.5 + draw.normal(0, 1, 40)[person]) * week + draw.normal(0, 2, 160)
    >>> table = pd.DataFrame({"score": score, "arm": arm, "week": week, "person": person})
    >>> fit = lmm.fit("score ~ arm * week + (1 + week | person)", table)
    >>> fit.names
    ('Intercept', 'arm[T.treated]', 'week', 'arm[T.treated]:week')
    >>> fit.converged, fit.n, fit.parameters
    (True, 160, 8)

The difference between the arms in week 4, with Kenward-Roger's standard error and degrees of freedom:

    >>> fit.contrast([0, 1, 0, 4])[["estimate", "se", "df"]].round(3).to_dict("records")
    [{'estimate': 2.642, 'se': 1.633, 'df': 38.0}]

`fit.summary()` prints it all, `fit.blups()` has the random effects of each person, `fit.refit(reml=False)` is for likelihood-ratio tests.
"""

from relseek_assets.mixed_models import ConvergenceWarning, MixedFit, MixedModelError, RandomTerm, fit, fit_matrices

__all__ = ["ConvergenceWarning", "MixedFit", "MixedModelError", "RandomTerm", "fit", "fit_matrices"]
