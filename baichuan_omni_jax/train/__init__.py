"""Training: `step` is one step, `trainer` the loop around it, `tasks` what differs between models, `hooks` the rest."""
