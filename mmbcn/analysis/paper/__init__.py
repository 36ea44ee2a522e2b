"""The paper's two kinds of figures about elimination singularities, on a task of minutes."""
