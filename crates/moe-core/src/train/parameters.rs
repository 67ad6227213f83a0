//! What is trained.

use std::{
    borrow::Cow,
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use rayon::prelude::*;

use super::{ParameterGroup, Projection, StoredValues, stored::Stored};
use crate::error::{Error, Result};

/// An array that an optimizer keeps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StateArray {
    /// Its shape, which need not be that of the parameter: the moments of a projected gradient are smaller.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Vec<f32>,
}

/// What an optimizer remembers of one parameter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Steps taken with it.
    pub steps: u64,
    /// Moments and the like, by name.
    pub arrays: BTreeMap<String, StateArray>,
    /// Counters, by name.
    pub scalars: BTreeMap<String, u64>,
}

impl OptimizerState {
    /// Bytes of its arrays.
    pub fn bytes(&self) -> u64 {
        self.arrays.values().map(|array| 4 * array.values.len() as u64).sum()
    }
}

/// How a [`ParameterGroup`] wants a parameter trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Settings {
    pub learning_rate: f64,
    pub weight_decay: bool,
    pub projection: Option<Projection>,
}

/// Trainable values with their gradient and what the optimizer remembers.
///
/// Memory is 4 bytes per value, 4 more from its first gradient on, again 4 while the gradients of several waves are
/// added, and 8 more from its first step with AdamW on. An inactive parameter has no gradient, and one whose values are
/// [stored](Parameters::store) elsewhere has no values in memory either.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// The values, row-major; empty while they are lent or stored elsewhere.
    pub values: Vec<f32>,
    /// Where the values are instead.
    pub(super) stored: Option<Stored>,
    shape: Vec<usize>,
    groups: usize,
    pub(super) gradient: Vec<f32>,
    /// Whether something was added to the gradient since the last step.
    pub(super) touched: bool,
    pub(super) state: OptimizerState,
    pub(super) settings: Option<Settings>,
    pub(super) active: Option<bool>,
    values_lent: bool,
    gradient_lent: bool,
}

impl Parameter {
    /// A parameter without a shape of its own: `[values]`.
    pub fn new(values: Vec<f32>) -> Self {
        Self {
            shape: vec![values.len()],
            groups: 1,
            values,
            stored: None,
            gradient: Vec::new(),
            touched: false,
            state: OptimizerState::default(),
            settings: None,
            active: None,
            values_lent: false,
            gradient_lent: false,
        }
    }

    /// A matrix, or a stack of matrices: what a [`Projection`] works on are the last two dimensions.
    ///
    /// # Errors
    /// [`Error::Input`] for a shape of another number of values.
    pub fn with_shape(values: Vec<f32>, shape: impl Into<Vec<usize>>) -> Result<Self> {
        let shape = shape.into();
        if shape.is_empty() || shape.iter().product::<usize>() != values.len() {
            return Err(Error::input("shape of a parameter", format!("{shape:?}"), format!("{} values", values.len())));
        }
        Ok(Self { shape, ..Self::new(values) })
    }

    /// A parameter whose values are elsewhere. It is not trained until they are [fetched](Parameters::fetch) and it is
    /// made
    /// [active](Parameters::set_active).
    pub fn stored(values: Arc<dyn StoredValues>, shape: impl Into<Vec<usize>>) -> Self {
        Self { stored: Some(Stored(values)), shape: shape.into(), active: Some(false), ..Self::new(Vec::new()) }
    }

    /// Where its values are, if that is not in memory.
    pub fn storage(&self) -> Option<&Arc<dyn StoredValues>> {
        self.stored.as_ref().map(|stored| &stored.0)
    }

    /// Its values, wherever they are.
    ///
    /// # Errors
    /// What keeps stored values from being read; [`Error::Input`] for another number of them.
    pub fn read(&self) -> Result<Cow<'_, [f32]>> {
        match &self.stored {
            Some(stored) => stored.read(self.len()).map(Cow::Owned),
            None => Ok(Cow::Borrowed(&self.values)),
        }
    }

    /// Makes it count as `groups` pieces of equal length, one after the other: each gets a trust ratio of its own from
    /// [`Lamb`](super::Lamb). The slices of a fused tensor of experts are such pieces.
    ///
    /// # Errors
    /// [`Error::Input`] if the values do not divide into them.
    pub fn in_groups(mut self, groups: usize) -> Result<Self> {
        if groups == 0 || !self.len().is_multiple_of(groups) {
            return Err(Error::input("groups of a parameter", groups, format!("a divisor of {}", self.len())));
        }
        self.groups = groups;
        Ok(self)
    }

    /// Number of values, lent or not.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Pieces of equal length.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// Whether it is trained now.
    pub fn is_active(&self) -> bool {
        self.active.unwrap_or(true)
    }

    /// Sum of the gradients since the last step; empty if none was added.
    pub fn gradient(&self) -> &[f32] {
        if self.touched { &self.gradient } else { &[] }
    }

    /// The gradient to add to, zeros at first; `None` if it is not trained now.
    ///
    /// Asking for it means that the parameter takes part in the next step. A parameter that nobody asked for is left as
    /// it is by that step, without decay and without momentum, as one without a gradient is in PyTorch.
    pub fn gradient_mut(&mut self) -> Option<&mut [f32]> {
        if !self.is_active() || self.gradient_lent {
            return None;
        }
        self.touch();
        Some(&mut self.gradient)
    }

    /// What the optimizer remembers.
    pub fn state(&self) -> &OptimizerState {
        &self.state
    }

    fn touch(&mut self) {
        if self.gradient.len() != self.len() {
            self.gradient = vec![0.0; self.len()];
        }
        self.touched = true;
    }

    /// Replaces shape and pieces by those of a saved state.
    pub(super) fn restored(values: Vec<f32>, shape: Vec<usize>, groups: usize) -> Result<Self> {
        Self::with_shape(values, shape)?.in_groups(groups)
    }
}

/// Adds a gradient to sums by the place of the parameter.
pub(super) fn add_gradient(sums: &mut BTreeMap<usize, Vec<f32>>, index: usize, gradient: Vec<f32>) {
    match sums.entry(index) {
        Entry::Vacant(place) => {
            place.insert(gradient);
        }
        Entry::Occupied(mut sum) => add(sum.get_mut(), &gradient),
    }
}

fn add(sum: &mut [f32], gradient: &[f32]) {
    sum.par_iter_mut().with_min_len(1 << 14).zip(gradient).for_each(|(sum, gradient)| *sum += gradient);
}

/// Values by name, or where they are.
pub(super) type Snapshot = BTreeMap<String, Kept>;

/// Values of a parameter as a snapshot keeps them.
#[derive(Clone, Debug)]
pub(super) enum Kept {
    Values(Vec<f32>),
    Stored(Stored),
}

/// Named parameters, in the order of their names.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parameters {
    by_name: BTreeMap<String, Parameter>,
    /// Grows whenever a parameter comes or goes.
    generation: u64,
}

impl Parameters {
    /// A set without parameters.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a parameter of shape `[values]`, or starts it anew.
    pub fn insert(&mut self, name: impl Into<String>, values: Vec<f32>) {
        self.add(name, Parameter::new(values));
    }

    /// Adds a parameter, or starts it anew.
    pub fn add(&mut self, name: impl Into<String>, parameter: Parameter) {
        self.generation += 1;
        self.by_name.insert(name.into(), parameter);
    }

    /// Takes a parameter out, with its gradient and state.
    pub fn remove(&mut self, name: &str) -> Option<Parameter> {
        let removed = self.by_name.remove(name);
        self.generation += u64::from(removed.is_some());
        removed
    }

    /// The parameter of this name.
    pub fn get(&self, name: &str) -> Option<&Parameter> {
        self.by_name.get(name)
    }

    /// The parameter of this name.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Parameter> {
        self.by_name.get_mut(name)
    }

    /// The gradient of this parameter to add to; `None` if there is none of this name or it is not trained now. See
    /// [`Parameter::gradient_mut`].
    pub fn gradient_mut(&mut self, name: &str) -> Option<&mut [f32]> {
        self.by_name.get_mut(name)?.gradient_mut()
    }

    /// Whether there is a parameter of this name and it is trained now: whether its gradient is worth computing.
    pub fn is_active(&self, name: &str) -> bool {
        self.by_name.get(name).is_some_and(Parameter::is_active)
    }

    /// Trains the parameter from now on, or does not: no gradient, no update, no decay. Its moments stay; see
    /// [`drop_state`](Self::drop_state).
    ///
    /// # Errors
    /// [`Error::Input`] for a name that there is not, and for making active what is [stored](Self::store).
    pub fn set_active(&mut self, name: &str, active: bool) -> Result<()> {
        let parameter = self.named(name)?;
        if active && parameter.stored.is_some() {
            return Err(Error::input(
                format!("values of parameter {name}"),
                "stored elsewhere",
                "fetched, to be trained",
            ));
        }
        parameter.active = Some(active);
        if !active {
            (parameter.gradient, parameter.touched) = (Vec::new(), false);
        }
        Ok(())
    }

    /// Forgets what the optimizer knows of a parameter, and frees its memory. Its next step is a first step.
    ///
    /// # Errors
    /// [`Error::Input`] for a name that there is not.
    pub fn drop_state(&mut self, name: &str) -> Result<()> {
        self.named(name)?.state = OptimizerState::default();
        Ok(())
    }

    /// Frees the memory of the values of a parameter that is not trained now: from now on they are those at `storage`,
    /// which has to have what the parameter had.
    ///
    /// # Errors
    /// [`Error::Input`] for a name that there is not, and for a parameter that is trained now or lent.
    pub fn store(&mut self, name: &str, storage: Arc<dyn StoredValues>) -> Result<()> {
        let parameter = self.named(name)?;
        if parameter.is_active() || parameter.values_lent {
            let found = if parameter.values_lent { "lent" } else { "trained now" };
            return Err(Error::input(format!("parameter {name}"), found, "one to be stored: neither lent nor trained"));
        }
        (parameter.values, parameter.stored) = (Vec::new(), Some(Stored(storage)));
        Ok(())
    }

    /// Reads the values of a parameter into memory, if they are [stored](Self::store).
    ///
    /// # Errors
    /// [`Error::Input`] for a name that there is not; what keeps them from being read.
    pub fn fetch(&mut self, name: &str) -> Result<()> {
        let parameter = self.named(name)?;
        if let Some(stored) = &parameter.stored {
            parameter.values = stored.read(parameter.len())?;
            parameter.stored = None;
        }
        Ok(())
    }

    /// Takes the values out, to be used where they are needed and given back with
    /// [`return_values`](Self::return_values) before the next step, snapshot or saved state.
    ///
    /// # Errors
    /// [`Error::Input`] for a name that there is not, or values that are lent already or stored elsewhere.
    pub fn lend_values(&mut self, name: &str) -> Result<Vec<f32>> {
        let parameter = self.named(name)?;
        if parameter.stored.is_some() {
            return Err(Error::input(format!("values of parameter {name}"), "stored elsewhere", "values to lend"));
        }
        if parameter.values_lent {
            return Err(Error::input(format!("values of parameter {name}"), "lent already", "values to lend"));
        }
        parameter.values_lent = true;
        Ok(std::mem::take(&mut parameter.values))
    }

    /// Gives lent values back, changed or not.
    ///
    /// # Errors
    /// [`Error::Input`] for a name that there is not, values that were not lent, or another number of them.
    pub fn return_values(&mut self, name: &str, values: Vec<f32>) -> Result<()> {
        let parameter = self.named(name)?;
        check_return("values", name, parameter.values_lent, values.len(), parameter.len())?;
        (parameter.values, parameter.values_lent) = (values, false);
        Ok(())
    }

    /// Takes the gradient out, zeros at first, to be given back with [`return_gradient`](Self::return_gradient). `None`
    /// for a parameter that is not trained now.
    ///
    /// # Errors
    /// As [`lend_values`](Self::lend_values).
    pub fn lend_gradient(&mut self, name: &str) -> Result<Option<Vec<f32>>> {
        let parameter = self.named(name)?;
        if parameter.gradient_lent {
            return Err(Error::input(format!("gradient of parameter {name}"), "lent already", "a gradient to lend"));
        }
        if !parameter.is_active() {
            return Ok(None);
        }
        parameter.touch();
        parameter.gradient_lent = true;
        Ok(Some(std::mem::take(&mut parameter.gradient)))
    }

    /// Gives a lent gradient back.
    ///
    /// # Errors
    /// As [`return_values`](Self::return_values).
    pub fn return_gradient(&mut self, name: &str, gradient: Vec<f32>) -> Result<()> {
        let parameter = self.named(name)?;
        check_return("gradient", name, parameter.gradient_lent, gradient.len(), parameter.len())?;
        (parameter.gradient, parameter.gradient_lent) = (gradient, false);
        Ok(())
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Parameter)> {
        self.by_name.iter().map(|(name, parameter)| (name.as_str(), parameter))
    }

    /// Number of values, trained now or not.
    pub fn len(&self) -> usize {
        self.by_name.values().map(Parameter::len).sum()
    }

    /// Number of values that are trained now.
    pub fn active_len(&self) -> usize {
        self.by_name.values().filter(|parameter| parameter.is_active()).map(Parameter::len).sum()
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of values, gradients and optimizer state, as allocated now.
    pub fn bytes(&self) -> u64 {
        let of = |p: &Parameter| 4 * (p.values.len() + p.gradient.len()) as u64 + p.state.bytes();
        self.by_name.values().map(of).sum()
    }

    /// Euclidean norm of all gradients together: squares are summed in f64, in pieces whose order does not depend on
    /// the number of threads.
    pub fn gradient_norm(&self) -> f64 {
        self.gradient_squares().iter().sum::<f64>().sqrt()
    }

    /// The sum of the squares of each parameter's gradient, in the order of names; 0 without one.
    pub(super) fn gradient_squares(&self) -> Vec<f64> {
        self.by_name.values().map(|p| piecewise(p.gradient(), square_sum)).collect()
    }

    /// Adds the gradients to sums by the place of the parameter, and leaves zeros that are not to be stepped.
    pub(super) fn drain_gradients(&mut self, sums: &mut BTreeMap<usize, Vec<f32>>) {
        let touched = self.by_name.values_mut().enumerate().filter(|(_, parameter)| parameter.touched);
        for (index, parameter) in touched {
            match sums.entry(index) {
                Entry::Vacant(place) => {
                    place.insert(std::mem::take(&mut parameter.gradient));
                }
                Entry::Occupied(mut sum) => {
                    add(sum.get_mut(), &parameter.gradient);
                    parameter.gradient.fill(0.0);
                }
            }
            parameter.touched = false;
        }
    }

    /// Takes these as the gradients, by the place of the parameter.
    pub(super) fn set_gradients(&mut self, gradients: BTreeMap<usize, Vec<f32>>) {
        let mut gradients = gradients.into_iter().peekable();
        for (index, parameter) in self.by_name.values_mut().enumerate() {
            if let Some((_, gradient)) = gradients.next_if(|(of, _)| *of == index) {
                (parameter.gradient, parameter.touched) = (gradient, true);
            }
        }
    }

    /// Takes these as the values, by the place of the parameter.
    pub(super) fn set_values(&mut self, values: BTreeMap<usize, Vec<f32>>) -> Result<()> {
        let mut new = values.into_iter().peekable();
        for (index, (name, parameter)) in self.by_name.iter_mut().enumerate() {
            if let Some((_, values)) = new.next_if(|(of, _)| *of == index) {
                if values.len() != parameter.len() {
                    return Err(Error::input(format!("values of parameter {name}"), values.len(), parameter.len()));
                }
                parameter.values = values;
            }
        }
        match new.next() {
            Some((index, _)) => Err(Error::input("place of a parameter", index, "that of one that there is")),
            None => Ok(()),
        }
    }

    /// Sets all gradients to zero.
    pub fn clear_gradients(&mut self) {
        for parameter in self.by_name.values_mut().filter(|parameter| parameter.touched) {
            parameter.gradient.fill(0.0);
            parameter.touched = false;
        }
    }

    pub(super) fn all_mut(&mut self) -> impl Iterator<Item = (&str, &mut Parameter)> {
        self.by_name.iter_mut().map(|(name, parameter)| (name.as_str(), parameter))
    }

    /// Changes whenever a parameter comes or goes.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Gives every parameter that has none yet the settings of the first group that matches its name.
    pub(super) fn assign(&mut self, groups: &[ParameterGroup]) {
        for (name, parameter) in self.by_name.iter_mut().filter(|(_, parameter)| parameter.settings.is_none()) {
            let group = groups.iter().find(|group| group.matches(name)).cloned().unwrap_or_default();
            let ParameterGroup { learning_rate, weight_decay, projection, .. } = group;
            parameter.settings = Some(Settings { learning_rate, weight_decay, projection });
            parameter.active.get_or_insert(!group.frozen);
        }
    }

    /// Names the first parameter of which something is still lent.
    pub(super) fn check_returned(&self) -> Result<()> {
        let lent = |p: &Parameter| match (p.values_lent, p.gradient_lent) {
            (true, _) => Some("values"),
            (_, true) => Some("gradient"),
            _ => None,
        };
        match self.by_name.iter().find_map(|(name, p)| Some((name, lent(p)?))) {
            Some((name, what)) => Err(Error::input(format!("{what} of parameter {name}"), "lent", "given back")),
            None => match self.by_name.iter().find(|(_, p)| p.stored.is_none() && p.values.len() != p.len()) {
                Some((name, p)) => Err(Error::input(format!("values of parameter {name}"), p.values.len(), p.len())),
                None => Ok(()),
            },
        }
    }

    /// The name of a parameter with a value that is not finite.
    pub(super) fn not_finite(&self) -> Option<&str> {
        let bad = |p: &Parameter| piecewise(&p.values, |v| f64::from(u8::from(v.iter().any(|v| !v.is_finite())))) > 0.0;
        self.by_name.iter().find(|(_, parameter)| bad(parameter)).map(|(name, _)| name.as_str())
    }

    /// The values alone.
    pub(super) fn snapshot(&self) -> Snapshot {
        let kept = |parameter: &Parameter| match &parameter.stored {
            Some(stored) => Kept::Stored(stored.clone()),
            None => Kept::Values(parameter.values.clone()),
        };
        self.by_name.iter().map(|(name, parameter)| (name.clone(), kept(parameter))).collect()
    }

    /// Takes back the values of a [`snapshot`](Self::snapshot).
    pub(super) fn restore(&mut self, snapshot: Snapshot) {
        for (name, kept) in snapshot {
            let Some(parameter) = self.by_name.get_mut(&name) else { continue };
            match kept {
                Kept::Values(values) if values.len() == parameter.len() => {
                    (parameter.values, parameter.stored) = (values, None);
                }
                Kept::Values(_) => {}
                Kept::Stored(stored) => (parameter.values, parameter.stored) = (Vec::new(), Some(stored)),
            }
        }
    }

    fn named(&mut self, name: &str) -> Result<&mut Parameter> {
        let expected = || format!("one of the {} parameters", self.by_name.len());
        match self.by_name.contains_key(name) {
            true => Ok(self.by_name.get_mut(name).expect("looked up above")),
            false => Err(Error::input("parameter", name, expected())),
        }
    }
}

fn check_return(what: &str, name: &str, lent: bool, found: usize, expected: usize) -> Result<()> {
    let field = format!("{what} of parameter {name}");
    match (lent, found == expected) {
        (false, _) => Err(Error::input(field, "given back", "lent before")),
        (true, false) => Err(Error::input(field, format!("{found} values"), format!("{expected} values"))),
        (true, true) => Ok(()),
    }
}

/// Sum of squares, in eight sums side by side.
fn square_sum(values: &[f32]) -> f64 {
    let (blocks, rest) = values.as_chunks::<8>();
    let mut sums = [0.0f64; 8];
    for block in blocks {
        for (sum, value) in sums.iter_mut().zip(block) {
            *sum += f64::from(*value) * f64::from(*value);
        }
    }
    let rest: f64 = rest.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
    sums.iter().sum::<f64>() + rest
}

/// Values of a piece of parallel work.
pub(super) const PIECE: usize = 1 << 14;

/// Sums `f` of pieces in their order.
pub(super) fn piecewise(values: &[f32], f: impl Fn(&[f32]) -> f64 + Sync + Send) -> f64 {
    values.par_chunks(PIECE).map(f).collect::<Vec<f64>>().iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_taken_when_it_is_needed() {
        let mut parameters = Parameters::new();
        parameters.insert("a", vec![1.0; 6]);
        parameters.insert("b", vec![1.0; 4]);
        assert_eq!((parameters.bytes(), parameters.len(), parameters.active_len()), (40, 10, 10));
        parameters.gradient_mut("a").unwrap()[1] = 3.0;
        assert_eq!((parameters.bytes(), parameters.gradient_norm()), (64, 3.0));
        parameters.set_active("a", false).unwrap();
        assert_eq!((parameters.bytes(), parameters.active_len()), (40, 4));
        assert!(parameters.gradient_mut("a").is_none() && !parameters.is_active("a"));
        assert!(parameters.gradient_mut("c").is_none() && !parameters.is_active("c"));
        assert!(parameters.set_active("c", true).unwrap_err().to_string().contains("parameter: found c"));
        assert_eq!(parameters.lend_gradient("a").unwrap(), None);
        parameters.set_active("a", true).unwrap();
        assert_eq!(parameters.gradient_mut("a").unwrap(), [0.0; 6]);
    }

    #[derive(Debug)]
    struct Sevens(usize);

    impl StoredValues for Sevens {
        fn read(&self) -> Result<Vec<f32>> {
            Ok(vec![7.0; self.0])
        }
    }

    #[test]
    fn values_that_are_stored_take_no_memory_until_they_are_fetched() {
        let mut parameters = Parameters::new();
        parameters.insert("a", vec![1.0; 6]);
        parameters.add("b", Parameter::stored(Arc::new(Sevens(4)), [2, 2]));
        assert_eq!((parameters.bytes(), parameters.len(), parameters.active_len()), (24, 10, 6));
        parameters.check_returned().unwrap();
        assert_eq!(*parameters.get("b").unwrap().read().unwrap(), [7.0; 4]);
        assert!(parameters.set_active("b", true).unwrap_err().to_string().contains("stored elsewhere"));
        assert!(parameters.lend_values("b").unwrap_err().to_string().contains("stored elsewhere"));
        let before = parameters.snapshot();
        parameters.fetch("b").unwrap();
        parameters.set_active("b", true).unwrap();
        parameters.get_mut("b").unwrap().values[0] = 1.0;
        assert_eq!((parameters.bytes(), parameters.active_len()), (40, 10));
        assert!(parameters.store("b", Arc::new(Sevens(4))).unwrap_err().to_string().contains("trained now"));
        parameters.restore(before);
        assert_eq!((parameters.bytes(), &*parameters.get("b").unwrap().read().unwrap()), (24, &[7.0f32; 4][..]));
        parameters.set_active("a", false).unwrap();
        parameters.store("a", Arc::new(Sevens(5))).unwrap();
        assert!(parameters.fetch("a").unwrap_err().to_string().contains("5"));
    }

    #[test]
    fn what_is_lent_comes_back_whole() {
        let mut parameters = Parameters::new();
        parameters.insert("a", vec![1.0, 2.0]);
        let values = parameters.lend_values("a").unwrap();
        assert_eq!((parameters.len(), parameters.get("a").unwrap().values.len()), (2, 0));
        assert!(parameters.check_returned().unwrap_err().to_string().contains("values of parameter a: found lent"));
        assert!(parameters.lend_values("a").is_err());
        assert!(parameters.return_values("a", vec![0.0]).unwrap_err().to_string().contains("1 values"));
        parameters.return_values("a", values).unwrap();
        assert!(parameters.return_values("a", vec![1.0, 2.0]).is_err());
        let mut gradient = parameters.lend_gradient("a").unwrap().unwrap();
        gradient[0] = 5.0;
        assert!(parameters.gradient_mut("a").is_none());
        assert!(parameters.check_returned().unwrap_err().to_string().contains("gradient of parameter a"));
        parameters.return_gradient("a", gradient).unwrap();
        parameters.check_returned().unwrap();
        assert_eq!(parameters.get("a").unwrap().gradient(), [5.0, 0.0]);
    }

    #[test]
    fn the_first_group_that_matches_counts() {
        let mut parameters = Parameters::new();
        ["layer.0.router", "layer.1.router", "embed"].into_iter().for_each(|n| parameters.insert(n, vec![0.0]));
        let group = |pattern: &str, learning_rate, frozen| {
            let pattern = pattern.to_string();
            ParameterGroup { pattern, learning_rate, frozen, ..ParameterGroup::default() }
        };
        parameters.set_active("layer.0.router", false).unwrap();
        parameters.assign(&[
            group("layer.*.router", 0.5, false),
            group("layer.0.*", 9.0, false),
            group("emb*", 1.0, true),
        ]);
        let factor = |name: &str| parameters.get(name).unwrap().settings.unwrap().learning_rate;
        assert_eq!((factor("layer.0.router"), factor("layer.1.router"), factor("embed")), (0.5, 0.5, 1.0));
        // what was set by hand stays
        let active: Vec<bool> = parameters.iter().map(|(_, p)| p.is_active()).collect();
        assert_eq!(active, [false, false, true]);
    }

    #[test]
    fn shapes_and_pieces_fit() {
        assert!(Parameter::with_shape(vec![0.0; 6], [2, 2]).unwrap_err().to_string().contains("[2, 2]"));
        assert!(Parameter::new(vec![0.0; 6]).in_groups(4).unwrap_err().to_string().contains("a divisor of 6"));
        let parameter = Parameter::with_shape(vec![0.0; 6], [3, 2]).unwrap().in_groups(3).unwrap();
        assert_eq!((parameter.shape(), parameter.groups(), parameter.len()), (&[3, 2][..], 3, 6));
    }
}
