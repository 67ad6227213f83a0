//! Weights of linear maps, stored as `[out, in]`, in the form that multiplies fastest on their device.

use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use burn::tensor::{Device, Tensor};

use super::{
    amx, bf16_dot, few_rows, for_rows_mut,
    packed::PackedWeights,
    product::{Matrix, new_product},
};
use crate::{
    adapters::{LinearAdapter, Tokens, Wanted},
    error::{Error, Result},
    host::{self, HostView},
    precision::Precision,
};

/// A weight matrix `[out, in]`. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Weight(Form);

#[derive(Clone, Debug)]
enum Form {
    /// f32 on the device.
    Dense(Box<Tensor<2>>),
    /// bf16 in the checkpoint, packed for products of pairs when a direction is first used.
    Packed(Arc<Packed>),
    /// Not read, since an adapter stands in for it.
    Absent([usize; 2]),
    /// The rows of a matrix, then the same rows again.
    Twice(Arc<Weight>),
    /// With something beside or instead of it.
    Adapted(Arc<(Weight, Arc<dyn LinearAdapter>)>),
}

/// Rows of a matrix of little-endian bf16, valid during a call.
pub type Bf16Rows<'a> = &'a [&'a [u8]];

/// Shows the rows of a matrix to a function, or fails to read them.
pub type Bf16Source = Box<dyn Fn(&mut dyn FnMut(Bf16Rows<'_>)) -> Result<()> + Send + Sync>;

/// A failure to read a weight that was put off until its first product. The weight counts as zeros from then on, and
/// whoever runs the model asks after every layer, so that no result of it is used. Of several in a layer, whose experts
/// are read by many threads, the one whose message sorts first is told.
#[derive(Clone, Debug, Default)]
pub struct ReadFailure(Arc<Mutex<Option<Error>>>);

impl ReadFailure {
    fn keep(&self, error: Error) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.as_ref().is_none_or(|kept| error.to_string() < kept.to_string()) {
            *kept = Some(error);
        }
    }

    /// The failure, if there was one since it was last asked for.
    ///
    /// # Errors
    /// That of the source.
    pub fn check(&self) -> Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }
}

struct Packed {
    outputs: usize,
    inputs: usize,
    device: Device,
    precision: Precision,
    source: Bf16Source,
    failure: ReadFailure,
    forward: OnceLock<PackedWeights>,
    backward: OnceLock<PackedWeights>,
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed[{}, {}]", self.outputs, self.inputs)
    }
}

impl Weight {
    /// A matrix `[out, in]` on its device.
    pub fn dense(matrix: Tensor<2>) -> Self {
        Self(Form::Dense(Box::new(matrix)))
    }

    /// A matrix of this shape that an adapter stands in for.
    pub(crate) fn absent(dims: [usize; 2]) -> Self {
        Self(Form::Absent(dims))
    }

    /// The same with `adapter` beside or instead of it.
    pub fn adapted(self, adapter: Arc<dyn LinearAdapter>) -> Self {
        Self(Form::Adapted(Arc::new((self, adapter))))
    }

    /// The rows of this matrix, then the same rows again, held and multiplied once: gate and up of experts whose up
    /// projection is the gate, too.
    pub fn twice(self) -> Self {
        Self(Form::Twice(Arc::new(self)))
    }

    /// The matrix that this one is [twice](Self::twice).
    pub fn once(&self) -> Option<&Self> {
        match &self.0 {
            Form::Twice(once) => Some(once),
            _ => None,
        }
    }

    /// The adapter on it.
    pub fn adapter(&self) -> Option<&Arc<dyn LinearAdapter>> {
        match &self.0 {
            Form::Adapted(both) => Some(&both.1),
            Form::Twice(once) => once.adapter(),
            _ => None,
        }
    }

    /// The rows before `at` and those from it on, as weights of their own; nothing if an adapter is on it.
    pub(crate) fn split_rows(&self, at: usize) -> Option<[Self; 2]> {
        let [outputs, _] = self.dims();
        let parts = [0..at, at..outputs];
        match &self.0 {
            Form::Dense(matrix) => {
                Some(parts.map(|rows| Self::dense(Tensor::clone(matrix).narrow(0, rows.start, rows.len()))))
            }
            Form::Packed(packed) => Some(parts.map(|rows| {
                let (outputs, whole) = (rows.len(), packed.clone());
                let source: Bf16Source = Box::new(move |f| (whole.source)(&mut |all| f(&all[rows.clone()])));
                let (inputs, device, failure) = (packed.inputs, packed.device.clone(), packed.failure.clone());
                let part = Packed::new([outputs, inputs], device, packed.precision, source, failure);
                Self(Form::Packed(Arc::new(part)))
            })),
            Form::Twice(once) => {
                let halves = once.adapter().is_none() && at == once.dims()[0];
                halves.then(|| [0, 1].map(|_| Self::clone(once)))
            }
            Form::Absent(_) | Form::Adapted(_) => None,
        }
    }

    /// Whether bf16 weights on `device` should come through [`from_bf16`](Self::from_bf16) for products in this
    /// precision.
    pub fn prefers_bf16(device: &Device, precision: Precision) -> bool {
        host::is_host(device) && (amx::available() || precision == Precision::Bf16 && bf16_dot::available())
    }

    /// A matrix `[outputs, inputs]` of bf16 that `source` shows, `outputs` rows of `2 * inputs` bytes. Becomes f32 at
    /// once where the device does not [prefer](Self::prefers_bf16) bf16; elsewhere it is read at its first product, and
    /// a failure of that is kept in `failure`.
    ///
    /// # Errors
    /// Those of `source` where it is read at once.
    pub fn from_bf16(
        [outputs, inputs]: [usize; 2],
        device: &Device,
        precision: Precision,
        source: Bf16Source,
        failure: &ReadFailure,
    ) -> Result<Self> {
        let packed = Packed::new([outputs, inputs], device.clone(), precision, source, failure.clone());
        // Asking also obtains the right to use the matrix units, without which they fault.
        match Self::prefers_bf16(device, precision) {
            true => Ok(Self(Form::Packed(Arc::new(packed)))),
            false => Ok(Self::dense(packed.read()?)),
        }
    }

    /// `[out, in]`.
    pub fn dims(&self) -> [usize; 2] {
        match &self.0 {
            Form::Dense(matrix) => matrix.dims(),
            Form::Packed(packed) => [packed.outputs, packed.inputs],
            Form::Absent(dims) => *dims,
            Form::Twice(once) => {
                let [outputs, inputs] = once.dims();
                [2 * outputs, inputs]
            }
            Form::Adapted(both) => both.0.dims(),
        }
    }

    /// The matrix as an f32 tensor; a copy where it is packed. With an adapter, the matrix that both are together,
    /// where they are one, and else the weight without it.
    pub fn to_tensor(&self) -> Tensor<2> {
        match &self.0 {
            Form::Dense(matrix) => Tensor::clone(matrix),
            Form::Packed(packed) => packed.to_tensor(),
            Form::Absent(dims) => unreachable!("a weight {dims:?} that an adapter stands in for is used by it alone"),
            Form::Twice(once) => {
                let matrix = once.to_tensor();
                Tensor::cat(vec![matrix.clone(), matrix], 0)
            }
            Form::Adapted(both) => both.1.matrix(&both.0).unwrap_or_else(|| both.0.to_tensor()),
        }
    }

    /// `x w^T + bias` for `x [n, in]`, all tokens of a wave, and `bias [out]`.
    pub fn forward(&self, x: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
        self.forward_for(x, bias, Tokens::WAVE)
    }

    /// The same for some tokens of a wave.
    pub fn forward_for(&self, x: &Tensor<2>, bias: Option<&Tensor<1>>, tokens: Tokens<'_>) -> Tensor<2> {
        let y = match &self.0 {
            Form::Dense(matrix) => match tokens {
                Tokens::Rows(_) => multiply_rows(x, matrix),
                Tokens::From(_) => multiply(x, matrix, true), // [n, out]
            },
            Form::Packed(packed) => packed.multiply(x, packed.outputs, packed.forward()),
            Form::Absent(dims) => unreachable!("a weight {dims:?} that an adapter stands in for is used by it alone"),
            Form::Twice(once) => {
                let y = once.forward_for(x, None, tokens);
                Tensor::cat(vec![y.clone(), y], 1)
            }
            Form::Adapted(both) => both.1.forward(&both.0, x, tokens),
        };
        match bias {
            Some(bias) => add_bias(y, bias),
            None => y,
        }
    }

    /// `dy w`: the gradient of [`forward`](Self::forward) with respect to `x`, for `dy [n, out]`. With an adapter that
    /// depends on its input, that of the weight without it.
    pub fn backward(&self, dy: &Tensor<2>) -> Tensor<2> {
        match &self.0 {
            Form::Dense(matrix) => multiply(dy, matrix, false), // [n, in]
            Form::Packed(packed) => packed.multiply(dy, packed.inputs, packed.backward()),
            Form::Twice(once) => once.backward(&sum_of_halves(dy)),
            Form::Absent(_) | Form::Adapted(_) => dy.clone().matmul(self.to_tensor()),
        }
    }

    /// The gradient of [`forward_for`](Self::forward_for) with respect to `x`, if it is wanted, and those of what an
    /// adapter trains. Only an adapter asks for `x`.
    pub fn gradient(
        &self,
        x: impl FnOnce() -> Tensor<2>,
        dy: &Tensor<2>,
        tokens: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        match &self.0 {
            Form::Adapted(both) if wanted.input || wanted.parameters => {
                both.1.backward(&both.0, &x(), dy, tokens, wanted)
            }
            Form::Twice(once) => once.gradient(x, &sum_of_halves(dy), tokens, wanted),
            _ => wanted.input.then(|| self.backward(dy)),
        }
    }
}

impl Packed {
    fn new(
        [outputs, inputs]: [usize; 2],
        device: Device,
        precision: Precision,
        source: Bf16Source,
        failure: ReadFailure,
    ) -> Self {
        let (forward, backward) = (OnceLock::new(), OnceLock::new());
        Self { outputs, inputs, device, precision, source, failure, forward, backward }
    }

    fn forward(&self) -> &PackedWeights {
        self.forward.get_or_init(|| self.pack(|rows| PackedWeights::transposed(rows, self.inputs)))
    }

    fn backward(&self) -> &PackedWeights {
        self.backward.get_or_init(|| self.pack(|rows| PackedWeights::straight(rows, self.inputs)))
    }

    fn pack(&self, f: impl Fn(Bf16Rows<'_>) -> PackedWeights) -> PackedWeights {
        let mut packed = None;
        let read = (self.source)(&mut |rows| {
            debug_assert_eq!(rows.len(), self.outputs);
            packed = Some(f(rows));
        });
        if let Err(error) = read {
            self.failure.keep(error);
        }
        packed.unwrap_or_else(|| {
            let zeros = vec![0; 2 * self.inputs];
            f(&vec![zeros.as_slice(); self.outputs])
        })
    }

    /// The matrix as f32.
    fn read(&self) -> Result<Tensor<2>> {
        let mut values = Vec::with_capacity(self.outputs * self.inputs);
        (self.source)(&mut |rows| {
            for row in rows {
                let (numbers, _) = row.as_chunks::<2>();
                values.extend(numbers.iter().map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16)));
            }
        })?;
        Ok(host::from_vec(values, [self.outputs, self.inputs], &self.device))
    }

    fn to_tensor(&self) -> Tensor<2> {
        self.read().unwrap_or_else(|error| {
            self.failure.keep(error);
            host::from_vec(vec![0.0; self.outputs * self.inputs], [self.outputs, self.inputs], &self.device)
        })
    }

    fn multiply(&self, x: &Tensor<2>, columns: usize, weights: &PackedWeights) -> Tensor<2> {
        let n = x.dims()[0];
        let view = HostView::new(x);
        let multiply = match self.precision == Precision::Bf16 && bf16_dot::available() {
            true if amx::available() => amx::multiply_rounded,
            true => bf16_dot::multiply,
            false => amx::multiply,
        };
        host::from_vec(multiply(view.as_slice(), n, weights), [n, columns], &self.device)
    }
}

/// The first half of the columns plus the second one.
fn sum_of_halves(dy: &Tensor<2>) -> Tensor<2> {
    let half = dy.dims()[1] / 2;
    if half == 0 {
        return dy.clone();
    }
    dy.clone().narrow(1, 0, half) + dy.clone().narrow(1, half, half)
}

/// `x w`, or `x w^T`.
fn multiply(x: &Tensor<2>, w: &Tensor<2>, transposed: bool) -> Tensor<2> {
    let ([n, inner], [rows, columns], device) = (x.dims(), w.dims(), x.device());
    if !host::is_host(&device) {
        let w = Tensor::clone(w);
        return x.clone().matmul(if transposed { w.transpose() } else { w });
    }
    let (x, w) = (HostView::new(x), HostView::new(w));
    let w = Matrix::new(w.as_slice(), rows, columns);
    let w = if transposed { w.transposed() } else { w };
    let outputs = if transposed { rows } else { columns };
    host::from_vec(new_product(Matrix::new(x.as_slice(), n, inner), w), [n, outputs], &device)
}

/// `x w^T` of `x [n, in]` and `w [out, in]`, for the tokens of one expert: how many there are is a matter of the wave,
/// and not of how a sweep cuts it into pieces, so that the kernel may depend on it.
fn multiply_rows(x: &Tensor<2>, w: &Tensor<2>) -> Tensor<2> {
    let ([n, inputs], [outputs, _]) = (x.dims(), w.dims());
    if !few_rows::NUMBERS.contains(&n) || inputs == 0 || outputs == 0 || !host::is_host(&x.device()) {
        return multiply(x, w, true);
    }
    let (view, matrix) = (HostView::new(x), HostView::new(w));
    host::from_vec(few_rows::multiply(view.as_slice(), matrix.as_slice(), inputs), [n, outputs], &x.device())
}

fn add_bias(y: Tensor<2>, bias: &Tensor<1>) -> Tensor<2> {
    let device = y.device();
    if !host::is_host(&device) {
        return y + bias.clone().unsqueeze::<2>();
    }
    let shape = y.dims();
    let view = HostView::new(bias);
    let bias = view.as_slice();
    let mut values = host::into_vec(y);
    for_rows_mut(&mut values, shape[1], |_, row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
    host::from_vec(values, shape, &device)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, device, pattern};

    #[test]
    fn packed_and_dense_weights_agree() {
        if !Weight::prefers_bf16(&device(), Precision::F32) {
            return;
        }
        let (outputs, inputs) = (37, 50);
        let bytes: Vec<u8> = host::into_vec(pattern([outputs, inputs], 1))
            .into_iter()
            .flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes())
            .collect();
        let source: Bf16Source = Box::new(move |f| {
            f(&bytes.chunks(2 * inputs).collect::<Vec<_>>());
            Ok(())
        });
        let packed =
            Weight::from_bf16([outputs, inputs], &device(), Precision::F32, source, &ReadFailure::default()).unwrap();
        let dense = Weight::dense(packed.to_tensor());
        assert_eq!(packed.dims(), dense.dims());
        let (x, dy, bias) = (pattern([21, inputs], 2), pattern([21, outputs], 3), pattern([1, outputs], 4));
        let bias = bias.reshape([outputs]);
        assert_close(&packed.forward(&x, Some(&bias)), &dense.forward(&x, Some(&bias)), 1e-5);
        assert_close(&packed.backward(&dy), &dense.backward(&dy), 1e-5);
    }

    #[test]
    fn a_matrix_twice_is_the_matrix_below_itself() {
        let once = Weight::dense(pattern([6, 5], 1));
        let twice = once.clone().twice();
        let stacked = Weight::dense(Tensor::cat(vec![once.to_tensor(), once.to_tensor()], 0));
        assert_eq!(twice.dims(), [12, 5]);
        assert_close(&twice.to_tensor(), &stacked.to_tensor(), 0.0);
        let (x, dy, bias) = (pattern([4, 5], 2), pattern([4, 12], 3), pattern([1, 12], 4).reshape([12]));
        assert_close(&twice.forward(&x, Some(&bias)), &stacked.forward(&x, Some(&bias)), 1e-6);
        assert_close(&twice.backward(&dy), &stacked.backward(&dy), 1e-5);
        let [first, second] = twice.split_rows(6).unwrap();
        assert_close(&first.to_tensor(), &second.to_tensor(), 0.0);
        assert!(twice.split_rows(5).is_none());
    }

    #[test]
    fn a_weight_that_cannot_be_read_is_an_error_and_no_panic() {
        let broken = || -> Bf16Source { Box::new(|_| Err(Error::input("tensor `w`", "nothing", "bytes"))) };
        let failure = ReadFailure::default();
        let packed = Packed::new([3, 4], device(), Precision::F32, broken(), failure.clone());
        assert_eq!(host::into_vec(packed.to_tensor()), [0.0; 12]);
        assert!(failure.check().unwrap_err().to_string().contains("tensor `w`"));
        assert!(failure.check().is_ok(), "it is told once");
        packed.pack(|rows| {
            assert_eq!((rows.len(), rows[0].len()), (3, 8));
            PackedWeights::transposed(rows, 4)
        });
        assert!(failure.check().is_err());
        if !Weight::prefers_bf16(&device(), Precision::F32) {
            assert!(Weight::from_bf16([3, 4], &device(), Precision::F32, broken(), &failure).is_err());
        }
    }
}
