"""What connects hylorada with other libraries; each module needs its library, and nothing else of hylorada does."""
