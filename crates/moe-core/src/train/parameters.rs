//! What is trained.

use std::collections::BTreeMap;

/// Trainable values with their gradient and the optimiser's moments.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// The values.
    pub values: Vec<f32>,
    /// Sum of the gradients since the last step.
    pub gradient: Vec<f32>,
    /// Moving average of the gradients.
    pub(super) first: Vec<f32>,
    /// Moving average of their squares.
    pub(super) second: Vec<f32>,
}

impl Parameter {
    fn new(values: Vec<f32>) -> Self {
        let zeros = || vec![0.0; values.len()];
        Self { gradient: zeros(), first: zeros(), second: zeros(), values }
    }
}

/// Named parameters, in the order of their names. 16 bytes of memory per value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parameters {
    by_name: BTreeMap<String, Parameter>,
}

impl Parameters {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a parameter, or starts it anew.
    pub fn insert(&mut self, name: impl Into<String>, values: Vec<f32>) {
        self.by_name.insert(name.into(), Parameter::new(values));
    }

    /// The parameter of this name.
    pub fn get(&self, name: &str) -> Option<&Parameter> {
        self.by_name.get(name)
    }

    /// The parameter of this name, to add gradients to.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Parameter> {
        self.by_name.get_mut(name)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Parameter)> {
        self.by_name.iter().map(|(name, parameter)| (name.as_str(), parameter))
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.by_name.values().map(|parameter| parameter.values.len()).sum()
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn all_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        self.by_name.values_mut()
    }

    /// Euclidean norm of all gradients together.
    pub fn gradient_norm(&self) -> f64 {
        let squares = |p: &Parameter| p.gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
        self.by_name.values().map(squares).sum::<f64>().sqrt()
    }

    /// Multiplies all gradients.
    pub fn scale_gradients(&mut self, factor: f32) {
        self.all_mut().for_each(|p| p.gradient.iter_mut().for_each(|g| *g *= factor));
    }

    /// Sets all gradients to zero.
    pub fn clear_gradients(&mut self) {
        self.all_mut().for_each(|p| p.gradient.fill(0.0));
    }

    /// The values alone.
    pub fn snapshot(&self) -> Vec<Vec<f32>> {
        self.by_name.values().map(|parameter| parameter.values.clone()).collect()
    }

    /// Takes back the values of a [`snapshot`](Self::snapshot) of the same parameters.
    pub fn restore(&mut self, snapshot: Vec<Vec<f32>>) {
        self.all_mut().zip(snapshot).for_each(|(parameter, values)| parameter.values = values);
    }
}
