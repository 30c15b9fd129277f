"""Small models of the first xLSTM on state tracking and recall (arXiv 2405.04517, section 4.1).

``flash-xlstm tasks`` is the command line of this package. A model is a :class:`.recipes.Recipe` of a
:class:`.data.Task`; :func:`.results.measure` trains and tests it.
"""
