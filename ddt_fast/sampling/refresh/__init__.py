"""Which steps refresh the encoder: `probe` compares the states of all steps, `search` finds the best steps, `schedules`
keeps them beside the checkpoint."""
