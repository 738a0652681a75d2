"""Analysis of models: complexity, feature maps and attention."""
