"""What a plan was predicted to do and what it did: measured, simulated and drawn (`dynaflow explain --svg --html`).

`measure` runs an example here and `engine` a model in its engine, both for a `PlanComparison`; `figure` draws it,
`page` puts it on a page.
"""
