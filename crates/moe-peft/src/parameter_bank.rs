//! Trained values, where the model can see them.

use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use burn::tensor::{Device, Tensor};
use moe_core::{
    host::{self, HostView},
    kernels::outer::add_transposed_product,
    train::{Parameter, Parameters},
};

use crate::{Error, Result};

/// A trained matrix as adapters use it.
///
/// The optimizer owns values and gradients on the host ([`Parameters`]); for a sweep they are [lent](Bank::lend) to the model and then
/// [returned](Bank::take_back), without a copy on the CPU backend, so that there is one storage of them. Adapters that are only run keep
/// their values here.
pub struct Live {
    name: String,
    shape: [usize; 2],
    device: Device,
    value: RwLock<Option<Tensor<2>>>,
    gradient: Mutex<Vec<f32>>,
    trained: AtomicBool,
    pieces: usize,
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.name, self.shape)
    }
}

impl Live {
    /// Values `[rows, columns]`, row-major, on `device`.
    ///
    /// # Errors
    /// [`Error::Input`] if there are more or fewer of them.
    pub fn new(name: impl Into<String>, shape: [usize; 2], values: Vec<f32>, device: &Device) -> Result<Arc<Self>> {
        let name = name.into();
        if values.len() != shape[0] * shape[1] {
            return Err(Error::input(
                format!("values of {name}"),
                values.len(),
                format!("{} x {}", shape[0], shape[1]),
            ));
        }
        let value = RwLock::new(Some(host::from_vec(values, shape, device)));
        Ok(Arc::new(Self {
            name,
            shape,
            device: device.clone(),
            value,
            gradient: Mutex::default(),
            trained: AtomicBool::new(true),
            pieces: 1,
        }))
    }

    /// The same as `pieces` parts of equal length, one after the other, each of which gets a trust ratio of its own from
    /// [`Lamb`](moe_core::train::Lamb): the experts of a fused tensor. To be called before it is shared.
    #[must_use]
    pub fn in_pieces(mut self: Arc<Self>, pieces: usize) -> Arc<Self> {
        if let Some(live) = Arc::get_mut(&mut self) {
            live.pieces = pieces.max(1);
        }
        self
    }

    /// Its name among the parameters.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `[rows, columns]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The device of its values.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The values; shares them. To be dropped before the sweep ends, or the next step copies them.
    ///
    /// # Panics
    /// If they were taken back and not lent again: [`Bank`] lends all of them for every sweep.
    pub fn value(&self) -> Tensor<2> {
        let value = self.value.read().unwrap_or_else(PoisonError::into_inner);
        value.clone().unwrap_or_else(|| panic!("{} is not lent", self.name))
    }

    /// Whether it is trained at present. What is not needs no gradient.
    pub fn is_trained(&self) -> bool {
        self.trained.load(Ordering::Relaxed)
    }

    /// Sets whether it is trained from the next sweep on. At first it is.
    pub fn set_trained(&self, trained: bool) {
        self.trained.store(trained, Ordering::Relaxed);
    }

    /// Lets `f` add to the gradient, `rows * columns` numbers.
    pub fn add_gradient(&self, f: impl FnOnce(&mut [f32])) {
        let mut gradient = self.lock();
        if gradient.is_empty() {
            gradient.resize(self.shape[0] * self.shape[1], 0.0);
        }
        f(&mut gradient);
    }

    /// Adds `factor * dy^T x` for the given columns of `dy [n, ..]` and of `x [n, ..]`, as many as it has rows and columns.
    pub fn add_product(&self, dy: &Tensor<2>, rows: Range<usize>, x: &Tensor<2>, columns: Range<usize>, factor: f32) {
        self.add_gradient(|gradient| add_transposed_product(dy, rows, x, columns, factor, gradient));
    }

    /// A copy of the values.
    pub fn to_vec(&self) -> Vec<f32> {
        HostView::new(&self.value()).as_slice().to_vec()
    }

    /// A copy of the gradient; empty if nothing was added to it.
    pub fn gradient(&self) -> Vec<f32> {
        self.lock().clone()
    }

    /// Whether the adapters have the values, rather than an optimizer.
    pub(crate) fn is_settled(&self) -> bool {
        self.value.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Hands shape and values to a hash.
    pub(crate) fn digest(&self, add: &mut dyn FnMut(&[u8])) {
        self.shape.iter().for_each(|size| add(&(*size as u64).to_le_bytes()));
        add_values(HostView::new(&self.value()).as_slice(), add);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<f32>> {
        self.gradient.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, value: Option<Tensor<2>>) -> Option<Tensor<2>> {
        std::mem::replace(&mut *self.value.write().unwrap_or_else(PoisonError::into_inner), value)
    }
}

/// Hands the number of some values and the values to a hash.
pub(crate) fn add_values(values: &[f32], add: &mut dyn FnMut(&[u8])) {
    add(&(values.len() as u64).to_le_bytes());
    let mut bytes = Vec::new();
    for values in values.chunks(1 << 14) {
        bytes.clear();
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        add(&bytes);
    }
}

/// The trained values of some adapters, by name.
#[derive(Clone, Debug, Default)]
pub struct Bank {
    live: BTreeMap<String, Arc<Live>>,
    /// Counts how often values were handed over, so that what was made from them knows when they may have changed. Clones share it.
    handed_over: Arc<AtomicU64>,
}

impl Bank {
    /// Nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds values.
    ///
    /// # Errors
    /// [`Error::Input`] if there are others of that name.
    pub fn insert(&mut self, live: Arc<Live>) -> Result<()> {
        let name = live.name.clone();
        match self.live.insert(name.clone(), live) {
            None => Ok(()),
            Some(_) => Err(Error::input("trained parameters", format!("`{name}` twice"), "a name of its own for each")),
        }
    }

    /// Values by name.
    pub fn get(&self, name: &str) -> Option<&Arc<Live>> {
        self.live.get(name)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Live>> {
        self.live.values()
    }

    /// The first values that an optimizer has.
    pub(crate) fn unsettled(&self) -> Option<&Arc<Live>> {
        self.live.values().find(|live| !live.is_settled())
    }

    /// How often values were handed over.
    pub(crate) fn handed_over(&self) -> u64 {
        self.handed_over.load(Ordering::Acquire)
    }

    fn hand_over(&self) {
        self.handed_over.fetch_add(1, Ordering::AcqRel);
    }

    /// Number of values.
    pub fn values(&self) -> usize {
        self.live.values().map(|live| live.shape[0] * live.shape[1]).sum()
    }

    /// Hands all values over to an optimizer: afterwards they are lent for each sweep.
    ///
    /// # Errors
    /// [`Error::Core`] for values that have been handed over before.
    pub fn parameters(&self) -> Result<Parameters> {
        self.hand_over();
        let mut parameters = Parameters::new();
        for live in self.live.values() {
            let values = live.put(None).map(host::into_vec).unwrap_or_default();
            let mut parameter = Parameter::with_shape(values, live.shape)?;
            if live.pieces > 1 {
                parameter = parameter.in_groups(live.pieces)?;
            }
            parameters.add(live.name.clone(), parameter);
        }
        Ok(parameters)
    }

    /// Lends the values of `parameters` to the adapters and, with `gradients`, the gradients of those that are trained. Names that only one
    /// of both has stay where they are.
    ///
    /// # Errors
    /// [`Error::Core`] for what is lent already.
    pub fn lend(&self, parameters: &mut Parameters, gradients: bool) -> Result<()> {
        self.hand_over();
        for live in self.live.values() {
            if parameters.get(live.name()).is_none() {
                continue;
            }
            live.put(Some(host::from_vec(parameters.lend_values(&live.name)?, live.shape, &live.device)));
            if gradients && live.is_trained() {
                *live.lock() = parameters.lend_gradient(&live.name)?.unwrap_or_default();
            }
        }
        Ok(())
    }

    /// Returns what was lent.
    ///
    /// # Errors
    /// [`Error::Core`] for what was not lent.
    pub fn take_back(&self, parameters: &mut Parameters, gradients: bool) -> Result<()> {
        self.hand_over();
        for live in self.live.values() {
            if parameters.get(live.name()).is_none() {
                continue;
            }
            if let Some(value) = live.put(None) {
                parameters.return_values(&live.name, host::into_vec(value))?;
            }
            let gradient = std::mem::take(&mut *live.lock());
            if gradients && live.is_trained() && parameters.is_active(&live.name) {
                parameters.return_gradient(&live.name, gradient)?;
            }
        }
        Ok(())
    }

    /// Leaves the values of `parameters` with the adapters, which can then be run without an optimizer.
    ///
    /// # Errors
    /// [`Error::Core`] for values that are lent elsewhere.
    pub fn settle(&self, mut parameters: Parameters) -> Result<()> {
        self.lend(&mut parameters, false)
    }

    /// Sets which values are trained from the next step on: those for which `trained` holds. The others keep their values, have no gradient
    /// and, with `forget`, lose the optimizer's moments.
    ///
    /// # Errors
    /// [`Error::Core`] for names that `parameters` do not have.
    pub fn set_trained(
        &self,
        parameters: &mut Parameters,
        forget: bool,
        trained: impl Fn(&Live) -> bool,
    ) -> Result<()> {
        for live in self.live.values() {
            let on = trained(live);
            live.set_trained(on);
            parameters.set_active(&live.name, on)?;
            if forget && !on {
                parameters.drop_state(&live.name)?;
            }
        }
        Ok(())
    }
}
