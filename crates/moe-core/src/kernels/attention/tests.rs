use super::*;
use crate::kernels::testing::{assert_close, pattern};

fn shape(heads: usize, kv_heads: usize, head_dim: usize, scale: f32, window: Option<usize>) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, value_dim: head_dim, scale, window, chunk: None, sinks: None }
}

#[test]
fn host_and_device_bodies_agree() {
    let sinks = |with: bool| with.then(|| Arc::from([0.5, -0.7, 3.0, 0.0]));
    for (window, lengths, value_dim, with_sinks) in [
        (None, vec![5, 1, 300], 6, false),
        (Some(3), vec![7, 150], 6, false),
        (Some(1), vec![4], 6, true),
        (None, vec![140, 3], 5, false),
        (Some(9), vec![150, 2], 8, true),
    ] {
        let shape = AttentionShape { value_dim, sinks: sinks(with_sinks), ..shape(4, 2, 6, 0.4, window) };
        let n = lengths.iter().sum();
        let mut start = 0;
        let sequences: Vec<_> = lengths
            .iter()
            .map(|l| {
                start += l;
                start - l..start
            })
            .collect();
        let (q, k, v, d) =
            (pattern([n, 24], 1), pattern([n, 12], 2), pattern([n, 2 * value_dim], 3), pattern([n, 4 * value_dim], 4));
        let host = attention(&q, &k, &v, &sequences, &shape, None);
        let device: Vec<_> =
            sequences.iter().map(|s| device::forward(&rows(&q, s), &rows(&k, s), &rows(&v, s), &shape, None)).collect();
        assert_close(&host, &Tensor::cat(device, 0), 1e-5);
        let (dq, dk, dv) = attention_backward(&q, &k, &v, &sequences, &shape, None, &d);
        let parts: Vec<_> = sequences
            .iter()
            .map(|s| device::backward(&rows(&q, s), &rows(&k, s), &rows(&v, s), &shape, None, &rows(&d, s)))
            .collect();
        assert_close(&dq, &Tensor::cat(parts.iter().map(|p| p.0.clone()).collect(), 0), 1e-5);
        assert_close(&dk, &Tensor::cat(parts.iter().map(|p| p.1.clone()).collect(), 0), 2e-5);
        assert_close(&dv, &Tensor::cat(parts.iter().map(|p| p.2.clone()).collect(), 0), 2e-5);
    }
}

#[test]
fn cached_queries_see_what_full_attention_sees() {
    let shape = AttentionShape { sinks: Some(Arc::from([0.3, -0.4])), ..shape(2, 1, 4, 0.5, Some(4)) };
    let (q, k, v) = (pattern([9, 8], 1), pattern([9, 4], 2), pattern([9, 4], 3));
    let full = attention(&q, &k, &v, std::slice::from_ref(&(0..9)), &shape, None);
    let last = rows(&q, &(7..9));
    assert_close(&attention_cached(&last, &k, &v, &shape, None), &rows(&full, &(7..9)), 1e-6);
    let (ks, vs) = (host::HostView::new(&k), host::HostView::new(&v));
    let span = cpu::Cached { queries: 0..2, keys: ks.as_slice(), values: vs.as_slice() };
    assert_close(&cpu::forward_spans(&last, &[span], &shape, None), &rows(&full, &(7..9)), 1e-6);
}

#[test]
fn gradient_matches_a_difference_quotient() {
    let sinks: Option<Arc<[f32]>> = Some(Arc::from([0.8, -0.4]));
    for (value_dim, sinks) in [(2, None), (3, None), (2, sinks)] {
        let shape = AttentionShape { value_dim, sinks, ..shape(2, 1, 2, 0.7, None) };
        let (q, k) = (pattern([3, 4], 1), pattern([3, 2], 2));
        let (v, d) = (pattern([3, value_dim], 3), pattern([3, 2 * value_dim], 4));
        let (dq, dk, dv) = attention_backward(&q, &k, &v, std::slice::from_ref(&(0..3)), &shape, None, &d);
        let loss = |q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>| -> f64 {
            host::into_vec(attention(q, k, v, std::slice::from_ref(&(0..3)), &shape, None) * d.clone())
                .iter()
                .map(|x| *x as f64)
                .sum()
        };
        let check = |x: &Tensor<2>, gradient: &Tensor<2>, at: &dyn Fn(&Tensor<2>) -> f64| {
            let gradient = host::HostView::new(gradient);
            for (i, found) in gradient.as_slice().iter().enumerate() {
                let moved = |h: f32| {
                    let mut values = host::HostView::new(x).as_slice().to_vec();
                    values[i] += h;
                    at(&host::from_vec(values, x.dims(), &x.device()))
                };
                let numeric = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                assert!((numeric - f64::from(*found)).abs() < 1e-3);
            }
        };
        check(&q, &dq, &|q| loss(q, &k, &v));
        check(&k, &dk, &|k| loss(&q, k, &v));
        check(&v, &dv, &|v| loss(&q, &k, v));
    }
}

/// Every query of 40 sees some of the keys before it: both bodies leave out the others, and gradients are those of
/// difference quotients.
#[test]
fn selected_keys_alone_are_seen() {
    let shape = AttentionShape { sinks: None, ..shape(2, 1, 4, 0.5, None) };
    let sequences = [0..150, 150..190];
    let n = 190;
    let seen = |position: usize| (0..=position as u32).filter(move |key| key % 3 == 0 || *key as usize == position);
    let of = |position: usize| if position < 6 { Vec::new() } else { seen(position).collect() };
    let selection = Selection::new(sequences.iter().flat_map(|s| (0..s.len()).map(of)));
    let (q, k, v, d) = (pattern([n, 8], 1), pattern([n, 4], 2), pattern([n, 4], 3), pattern([n, 8], 4));
    let found = attention(&q, &k, &v, &sequences, &shape, Some(&selection));
    let dense = attention(&q, &k, &v, &sequences, &shape, None);
    assert_close(&rows(&found, &(0..6)), &rows(&dense, &(0..6)), 0.0);
    // What a query sees does not follow from what it does not see.
    let hidden: Vec<f32> = (0..n * 4).map(|i| if (i / 4) % 150 % 3 == 1 { 1.0 } else { 0.0 }).collect();
    let other = v.clone() + host::from_vec(hidden, [n, 4], &v.device());
    let moved = attention(&q, &k, &other, &sequences, &shape, Some(&selection));
    assert_close(&rows(&found, &(12..13)), &rows(&moved, &(12..13)), 0.0);
    let (dq, dk, dv) = attention_backward(&q, &k, &v, &sequences, &shape, Some(&selection), &d);
    for s in &sequences {
        let part = selection.part(s);
        let (q, k, v) = (rows(&q, s), rows(&k, s), rows(&v, s));
        assert_close(&rows(&found, s), &device::forward(&q, &k, &v, &shape, Some(&part)), 1e-5);
        let on_device = device::backward(&q, &k, &v, &shape, Some(&part), &rows(&d, s));
        assert_close(&rows(&dq, s), &on_device.0, 1e-5);
        assert_close(&rows(&dk, s), &on_device.1, 2e-5);
        assert_close(&rows(&dv, s), &on_device.2, 2e-5);
    }
    let loss = |v: &Tensor<2>| -> f64 {
        let y = attention(&q, &k, v, &sequences, &shape, Some(&selection));
        host::into_vec(y * d.clone()).iter().map(|x| *x as f64).sum()
    };
    let gradient = host::HostView::new(&dv);
    for i in [0, 5, 200, 340, 601, 759] {
        let moved = |h: f32| {
            let mut values = host::HostView::new(&v).as_slice().to_vec();
            values[i] += h;
            loss(&host::from_vec(values, v.dims(), &v.device()))
        };
        let numeric = (moved(1e-1) - moved(-1e-1)) / 2e-1;
        assert!((numeric - f64::from(gradient.as_slice()[i])).abs() < 1e-3, "{i}");
    }
}
