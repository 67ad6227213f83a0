//! Routing of one layer among true and null experts, its gradient, and the balance of both.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use moe_core::{
    RouterTokens, RoutingRule, RuleGradients,
    host::{self, HostView},
    router::{Routed, Router},
    trace::WaveInfo,
};

use crate::{Live, SweepListener};

/// The rule of one layer.
#[derive(Debug)]
pub(super) struct NullLayer {
    layer: usize,
    experts: usize,
    top_k: usize,
    /// `[m, H]`.
    rows: Arc<Live>,
    balance: Arc<RwLock<f64>>,
    /// The balance loss of the wave that trained last.
    last: Mutex<f64>,
}

impl NullLayer {
    pub fn new(layer: usize, experts: usize, top_k: usize, rows: Arc<Live>, balance: Arc<RwLock<f64>>) -> Self {
        Self { layer, experts, top_k, rows, balance, last: Mutex::new(0.0) }
    }

    pub fn rows(&self) -> &Arc<Live> {
        &self.rows
    }

    pub fn experts(&self) -> usize {
        self.experts
    }

    pub fn top_k(&self) -> usize {
        self.top_k
    }

    fn nulls(&self) -> usize {
        self.rows.shape()[0]
    }

    /// Logits of true and null experts `[T, n + m]`.
    fn logits(&self, tokens: &RouterTokens<'_>) -> moe_core::Result<Vec<f32>> {
        let nulls = self.nulls();
        if nulls == 0 {
            return Ok(tokens.logits.to_vec());
        }
        let view = HostView::new(&tokens.read()?.clone().matmul(self.rows.value().transpose()));
        let rows = tokens.logits.chunks_exact(self.experts).zip(view.as_slice().chunks_exact(nulls));
        Ok(rows.flat_map(|(own, null)| own.iter().chain(null).copied()).collect())
    }

    /// Where tokens go among all of them; null experts have no weight.
    fn among_all(&self, router: &Router, logits: &[f32]) -> Routed {
        let all = self.experts + self.nulls();
        let mut routed = router.with_top_k(self.top_k).route(logits, all, None);
        let is_true: Vec<bool> = routed.selected.iter().map(|e| (*e as usize) < self.experts).collect();
        router.weigh_members(logits, &mut routed, |slot| is_true[slot]);
        routed
    }

    /// Shares of all experts, and the load of each with that of null experts in common.
    fn loads(&self, router: &Router, logits: &[f32], routed: &Routed) -> (Vec<f64>, Vec<f64>) {
        let all = self.experts + self.nulls();
        let mut shares = Vec::with_capacity(logits.len());
        let mut of_token = Vec::new();
        for row in logits.chunks_exact(all) {
            router.shares(row, &mut of_token);
            shares.extend_from_slice(&of_token);
        }
        let tokens = (logits.len() / all).max(1) as f64;
        let mut loads = vec![0.0; all];
        routed.selected.iter().for_each(|e| loads[*e as usize] += 1.0 / tokens);
        let common = loads[self.experts..].iter().sum::<f64>() / self.nulls().max(1) as f64;
        loads[self.experts..].fill(common);
        (shares, loads)
    }
}

impl RoutingRule for NullLayer {
    fn route(&self, tokens: &RouterTokens<'_>) -> moe_core::Result<Routed> {
        let logits = self.logits(tokens)?;
        let routed = self.among_all(tokens.router, &logits);
        let k = self.top_k;
        let mut selected = Vec::with_capacity(routed.selected.len());
        for chosen in routed.selected.chunks_exact(k) {
            // a place for every null expert, without a weight
            let mut free = (0..self.experts as u32).filter(|e| !chosen.contains(e));
            selected.extend(chosen.iter().map(|e| match (*e as usize) < self.experts {
                true => *e,
                false => free.next().unwrap_or(0),
            }));
        }
        Ok(Routed { experts: self.experts, top_k: k, selected, weights: routed.weights })
    }

    fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        _: &Routed,
        d_weights: &[f32],
        parameters: bool,
    ) -> moe_core::Result<RuleGradients> {
        let (experts, nulls) = (self.experts, self.nulls());
        let all = experts + nulls;
        let logits = self.logits(tokens)?;
        let routed = self.among_all(tokens.router, &logits);
        let mut d = tokens.router.members_backward(&logits, &routed, d_weights);
        let coefficient = *self.balance.read().unwrap_or_else(PoisonError::into_inner);
        if parameters && coefficient != 0.0 {
            let (shares, loads) = self.loads(tokens.router, &logits, &routed);
            let count = (logits.len() / all).max(1) as f64;
            // beside the mean loss per predicted token
            let factor = coefficient * all as f64 / count * tokens.wave.loss_tokens() as f64;
            let mut loss = 0.0;
            for (d, p) in d.chunks_exact_mut(all).zip(shares.chunks_exact(all)) {
                let mean: f64 = p.iter().zip(&loads).map(|(p, f)| p * f).sum();
                loss += coefficient * all as f64 * mean / count;
                d.iter_mut().zip(p.iter().zip(&loads)).for_each(|(d, (p, f))| *d += (factor * p * (f - mean)) as f32);
            }
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = loss;
        }
        let own: Vec<f32> = d.chunks_exact(all).flat_map(|row| row[..experts].iter().copied()).collect();
        if nulls == 0 {
            return Ok(own.into());
        }
        let null: Vec<f32> = d.chunks_exact(all).flat_map(|row| row[experts..].iter().copied()).collect();
        let x = tokens.read()?;
        let d_null = host::from_vec(null, [tokens.tokens(), nulls], &x.device());
        if parameters && self.rows.is_trained() {
            self.rows.add_product(&d_null, 0..nulls, x, 0..x.dims()[1], 1.0);
        }
        Ok(RuleGradients { logits: own, input: Some(d_null.matmul(self.rows.value())) })
    }
}

impl SweepListener for NullLayer {
    fn begin_wave(&self, _: &WaveInfo) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = 0.0;
    }

    fn losses(&self) -> Vec<(&'static str, f64)> {
        tracing::trace!(layer = self.layer, "balance of null experts");
        vec![("null_balance", *self.last.lock().unwrap_or_else(PoisonError::into_inner))]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};
    use moe_checkpoint::{Routing, RoutingKind};
    use moe_core::trace::SequenceInfo;

    use super::*;

    const N: usize = 4;
    const H: usize = 3;

    fn router() -> Router {
        Router::new(&Routing::new(2, RoutingKind::SoftmaxTopK { renormalize: true })).unwrap()
    }

    fn layer(rows: Vec<f32>, top_k: usize, balance: f64) -> NullLayer {
        let rows = Live::new("null", [rows.len() / H, H], rows, &Device::flex()).unwrap();
        NullLayer::new(0, N, top_k, rows, Arc::new(RwLock::new(balance)))
    }

    fn wave(tokens: usize) -> WaveInfo {
        WaveInfo {
            id: 0,
            tokens,
            ids: Vec::new(),
            sequences: vec![SequenceInfo { tokens: 0..tokens, loss_tokens: tokens - 1 }],
        }
    }

    fn input(tokens: usize) -> Vec<f32> {
        (0..tokens * H).map(|i| (i as f32 * 2.3).sin()).collect()
    }

    fn logits(tokens: usize) -> Vec<f32> {
        (0..tokens * N).map(|i| (i as f32 * 12.9 + 1.0).sin() * 1.5).collect()
    }

    fn with<R>(x: &[f32], logits: &[f32], f: impl FnOnce(&RouterTokens<'_>) -> R) -> R {
        let tokens = logits.len() / N;
        let (router, wave) = (router(), wave(tokens));
        let x: Tensor<2> = host::from_vec(x.to_vec(), [tokens, H], &Device::flex());
        let at = RouterTokens {
            layer: 0,
            experts: N,
            logits,
            bias: None,
            input: Some(&x),
            router: &router,
            table: None,
            wave: &wave,
        };
        f(&at)
    }

    #[test]
    fn without_null_experts_it_is_the_model_and_true_weights_sum_to_one() {
        let (x, z) = (input(9), logits(9));
        let own = router().route(&z, N, None);
        assert_eq!(with(&x, &z, |at| layer(vec![], 2, 0.0).route(at).unwrap()), own);
        let rows: Vec<f32> = (0..4 * H).map(|i| (i as f32).cos()).collect();
        let routed = with(&x, &z, |at| layer(rows, 3, 0.0).route(at).unwrap());
        let sums: Vec<f32> = routed.weights.chunks(3).map(|w| w.iter().sum()).collect();
        assert!(sums.iter().all(|sum| *sum == 0.0 || (sum - 1.0).abs() < 1e-6), "{sums:?}");
        let fewer = routed.weights.chunks(3).filter(|w| w.contains(&0.0)).count();
        assert!(fewer > 0, "no token chose a null expert");
        for chosen in routed.selected.chunks(3) {
            assert!(chosen.iter().enumerate().all(|(i, e)| !chosen[..i].contains(e)), "{chosen:?}");
        }
    }

    #[test]
    fn a_token_of_null_experts_alone_weighs_nothing_and_has_a_finite_gradient() {
        let (x, z) = (vec![1.0; 2 * H], vec![-9.0; 2 * N]);
        let null = layer(vec![5.0; 3 * H], 2, 0.1);
        let routed = with(&x, &z, |at| null.route(at).unwrap());
        assert_eq!(routed.weights, [0.0; 4]);
        let gradients = with(&x, &z, |at| null.backward(at, &routed, &[1.0; 4], true).unwrap());
        assert!(gradients.logits.iter().all(|d| d.is_finite()));
    }

    #[test]
    fn the_order_of_null_experts_changes_neither_loss_nor_gradient() {
        let (x, z) = (input(12), logits(12));
        let rows: Vec<f32> = (0..3 * H).map(|i| (i as f32 * 1.3).cos()).collect();
        let turned: Vec<f32> = rows[H..].iter().chain(&rows[..H]).copied().collect();
        let run = |rows: &[f32]| {
            let null = layer(rows.to_vec(), 3, 0.5);
            let routed = with(&x, &z, |at| null.route(at).unwrap());
            let gradients = with(&x, &z, |at| null.backward(at, &routed, &[0.3; 36], true).unwrap());
            (null.losses()[0].1, gradients.logits, null.rows.gradient())
        };
        let ((a, da, ga), (b, db, gb)) = (run(&rows), run(&turned));
        assert!((a - b).abs() < 1e-6 && a > 0.0);
        assert!(da.iter().zip(&db).all(|(a, b)| (a - b).abs() < 1e-5));
        let back: Vec<f32> = gb[2 * H..].iter().chain(&gb[..2 * H]).copied().collect();
        assert!(ga.iter().zip(back).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn at_balance_the_loss_is_the_coefficient_times_the_experts_per_token() {
        // uniform shares: whatever the load, a (n + m) sum f / (n + m) = a k
        let null = layer(vec![0.0; 4 * H], 3, 0.25);
        let (x, z) = (input(8), vec![0.0; 8 * N]);
        let routed = with(&x, &z, |at| null.route(at).unwrap());
        with(&x, &z, |at| null.backward(at, &routed, &[0.0; 24], true).unwrap());
        assert!((null.losses()[0].1 - 0.25 * 3.0).abs() < 1e-6);
    }

    #[test]
    fn gradients_match_difference_quotients() {
        let (x, z) = (input(10), logits(10));
        let rows: Vec<f32> = (0..2 * H).map(|i| (i as f32 * 0.7).sin() * 0.8).collect();
        let d: Vec<f32> = (0..30).map(|i| ((i * 5) % 7) as f32 - 3.0).collect();
        let null = layer(rows.clone(), 3, 0.4);
        let routed = with(&x, &z, |at| null.route(at).unwrap());
        let found = with(&x, &z, |at| null.backward(at, &routed, &d, true).unwrap());
        let value = |x: &[f32], z: &[f32], rows: &[f32]| {
            let null = layer(rows.to_vec(), 3, 0.4);
            let again = with(x, z, |at| null.route(at).unwrap());
            with(x, z, |at| null.backward(at, &again, &d, true).unwrap());
            let same = again.selected == routed.selected;
            let weights: f64 = again.weights.iter().zip(&d).map(|(w, d)| f64::from(*w) * f64::from(*d)).sum();
            (same, weights + null.losses()[0].1 * 9.0)
        };
        let (gradient, input_gradient) = (null.rows.gradient(), HostView::new(&found.input.unwrap()));
        let mut compared = 0;
        let mut check = |up: (bool, f64), down: (bool, f64), found: f32| {
            if up.0 && down.0 {
                let numeric = (up.1 - down.1) / 4e-3;
                assert!((numeric - f64::from(found)).abs() < 1e-2, "{numeric} {found}");
                compared += 1;
            }
        };
        let moved = |values: &[f32], i: usize, h: f32| {
            let mut values = values.to_vec();
            values[i] += h;
            values
        };
        for i in 0..z.len() {
            check(value(&x, &moved(&z, i, 2e-3), &rows), value(&x, &moved(&z, i, -2e-3), &rows), found.logits[i]);
        }
        for (i, g) in gradient.iter().enumerate() {
            check(value(&x, &z, &moved(&rows, i, 2e-3)), value(&x, &z, &moved(&rows, i, -2e-3)), *g);
        }
        for (i, g) in input_gradient.as_slice().iter().enumerate() {
            check(value(&moved(&x, i, 2e-3), &z, &rows), value(&moved(&x, i, -2e-3), &z, &rows), *g);
        }
        assert!(compared > 50, "{compared}");
    }
}
