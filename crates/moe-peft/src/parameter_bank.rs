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
    train::{Parameter, Parameters, StoredValues},
};

use crate::{Error, Result};

/// A trained matrix as adapters use it.
///
/// The optimizer owns values and gradients on the host ([`Parameters`]); for a sweep they are [lent](Bank::lend) to the
/// model and then
/// [returned](Bank::take_back), without a copy on the CPU backend, so that there is one storage of them. Adapters that
/// are only run keep their values here. Values that are not trained at the moment may be stored elsewhere: as the
/// weights of the base that they
/// [still are](Self::of_base), or in a file.
pub struct Live {
    name: String,
    shape: [usize; 2],
    device: Device,
    value: RwLock<Held>,
    /// The values of the base.
    base: Option<Arc<dyn StoredValues>>,
    /// Why stored values could not be read in a sweep, which knows no errors.
    failed: Mutex<Option<moe_core::Error>>,
    gradient: Mutex<Vec<f32>>,
    trained: AtomicBool,
    pieces: usize,
}

/// Where values are.
// Nearly always the larger one.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum Held {
    Here(Tensor<2>),
    /// With an optimizer.
    Lent,
    Elsewhere(Arc<dyn StoredValues>),
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
        let value = Held::Here(host::from_vec(values, shape, device));
        Ok(Arc::new(Self::held(name, shape, value, None, device)))
    }

    /// Values `[rows, columns]` that are those of the base until they are trained, and take no memory until then.
    pub fn of_base(
        name: impl Into<String>,
        shape: [usize; 2],
        base: Arc<dyn StoredValues>,
        device: &Device,
    ) -> Arc<Self> {
        Arc::new(Self::held(name.into(), shape, Held::Elsewhere(base.clone()), Some(base), device))
    }

    fn held(
        name: String,
        shape: [usize; 2],
        value: Held,
        base: Option<Arc<dyn StoredValues>>,
        device: &Device,
    ) -> Self {
        Self {
            name,
            shape,
            device: device.clone(),
            value: RwLock::new(value),
            base,
            failed: Mutex::default(),
            gradient: Mutex::default(),
            trained: AtomicBool::new(true),
            pieces: 1,
        }
    }

    /// The same as `pieces` parts of equal length, one after the other, each of which gets a trust ratio of its own
    /// from [`Lamb`](moe_core::train::Lamb): the experts of a fused tensor. To be called before it is shared.
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

    /// The values; shares them, or reads them where they are stored. To be dropped before the sweep ends, or the next
    /// step copies them. Where they cannot be read they are zeros, and [`Bank::check_read`] says why.
    ///
    /// # Panics
    /// If they were taken back and not lent again: [`Bank`] lends all of them for every sweep.
    pub fn value(&self) -> Tensor<2> {
        let storage = match &*self.value.read().unwrap_or_else(PoisonError::into_inner) {
            Held::Here(value) => return value.clone(),
            Held::Lent => panic!("{} is not lent", self.name),
            Held::Elsewhere(storage) => storage.clone(),
        };
        let len = self.shape[0] * self.shape[1];
        let values = match storage.read() {
            Ok(values) if values.len() == len => values,
            other => {
                let what = format!("values of {}", self.name);
                let error = match other {
                    Ok(values) => moe_core::Error::observer(Error::input(what, values.len(), len)),
                    Err(error) => error,
                };
                self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                vec![0.0; len]
            }
        };
        host::from_vec(values, self.shape, &self.device)
    }

    /// Whether the values are still those of the base, and not in memory.
    pub fn is_base(&self) -> bool {
        match (&*self.value.read().unwrap_or_else(PoisonError::into_inner), &self.base) {
            (Held::Elsewhere(storage), Some(base)) => Arc::ptr_eq(storage, base),
            _ => false,
        }
    }

    /// Where the values of the base are, if it began [with them](Self::of_base).
    pub(crate) fn base(&self) -> Option<&Arc<dyn StoredValues>> {
        self.base.as_ref()
    }

    /// Bytes of values and gradient that are in memory here.
    fn bytes(&self) -> u64 {
        let here = matches!(&*self.value.read().unwrap_or_else(PoisonError::into_inner), Held::Here(_));
        4 * (usize::from(here) * self.shape[0] * self.shape[1] + self.lock().len()) as u64
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

    /// Adds `factor * dy^T x` for the given columns of `dy [n, ..]` and of `x [n, ..]`, as many as it has rows and
    /// columns.
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
        !matches!(&*self.value.read().unwrap_or_else(PoisonError::into_inner), Held::Lent)
    }

    /// Hands shape and values to a hash.
    pub(crate) fn digest(&self, add: &mut dyn FnMut(&[u8])) {
        self.shape.iter().for_each(|size| add(&(*size as u64).to_le_bytes()));
        if self.is_base() {
            return add(b"base");
        }
        add_values(HostView::new(&self.value()).as_slice(), add);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<f32>> {
        self.gradient.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, value: Held) -> Held {
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
    /// Counts how often values were handed over, so that what was made from them knows when they may have changed.
    /// Clones share it.
    handed_over: Arc<AtomicU64>,
}

impl Bank {
    /// A bank without parameters.
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

    /// Bytes of values and gradients that are in memory here, rather than with an optimizer or stored.
    pub fn bytes(&self) -> u64 {
        self.live.values().map(|live| live.bytes()).sum()
    }

    /// Whether all stored values that were asked for since the last call could be read.
    ///
    /// # Errors
    /// What kept them from being read.
    pub fn check_read(&self) -> Result<()> {
        let failed = |live: &Arc<Live>| live.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        match self.live.values().find_map(failed) {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// Hands all values over to an optimizer: afterwards they are lent for each sweep. Stored ones stay where they are.
    ///
    /// # Errors
    /// [`Error::Core`] for values that have been handed over before.
    pub fn parameters(&self) -> Result<Parameters> {
        self.hand_over();
        let mut parameters = Parameters::new();
        for live in self.live.values() {
            let mut parameter = match live.put(Held::Lent) {
                Held::Here(values) => Parameter::with_shape(host::into_vec(values), live.shape)?,
                Held::Lent => Parameter::with_shape(Vec::new(), live.shape)?,
                Held::Elsewhere(storage) => Parameter::stored(storage, live.shape),
            };
            if live.pieces > 1 {
                parameter = parameter.in_groups(live.pieces)?;
            }
            parameters.add(live.name.clone(), parameter);
        }
        Ok(parameters)
    }

    /// Lends the values of `parameters` to the adapters and, with `gradients`, the gradients of those that are trained.
    /// Names that only one of both has stay where they are.
    ///
    /// # Errors
    /// [`Error::Core`] for what is lent already.
    pub fn lend(&self, parameters: &mut Parameters, gradients: bool) -> Result<()> {
        self.hand_over();
        for live in self.live.values() {
            let Some(parameter) = parameters.get(live.name()) else { continue };
            if let Some(storage) = parameter.storage() {
                live.put(Held::Elsewhere(storage.clone()));
                continue;
            }
            live.put(Held::Here(host::from_vec(parameters.lend_values(&live.name)?, live.shape, &live.device)));
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
            if let Held::Here(value) = live.put(Held::Lent) {
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

    /// Sets which values are trained from the next step on: those for which `trained` holds, which are read if they are
    /// stored. The others keep their values, have no gradient and, with `forget`, lose the optimizer's moments.
    ///
    /// # Errors
    /// [`Error::Core`] for names that `parameters` do not have, and for what keeps stored values from being read.
    pub fn set_trained(
        &self,
        parameters: &mut Parameters,
        forget: bool,
        trained: impl Fn(&Live) -> bool,
    ) -> Result<()> {
        for live in self.live.values() {
            let on = trained(live);
            live.set_trained(on);
            if on {
                parameters.fetch(&live.name)?;
            }
            parameters.set_active(&live.name, on)?;
            if forget && !on {
                parameters.drop_state(&live.name)?;
            }
        }
        Ok(())
    }
}
