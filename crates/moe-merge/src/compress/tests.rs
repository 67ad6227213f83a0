use moe_checkpoint::Activation;

use super::*;
use crate::testing::{biased_expert, expert, noise};

fn close(a: &[f32], b: &[f32], tolerance: f32) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance)
}

#[test]
fn a_split_is_the_matrix_before_rows_go() {
    for (rows, cols, rank) in [(9, 14, 3), (14, 9, 3), (5, 6, 8), (1, 7, 2)] {
        let matrix = noise(rows * cols, 3);
        let split = LowRankSparse::split(&matrix, rows, cols, rank).unwrap();
        assert!(close(&split.dense(), &matrix, 1e-6));
        let rank = rank.min(rows).min(cols);
        assert_eq!(split.parameters(), rank * (rows + cols) + rows * cols);
        // The low-rank part alone is as good as the best of its rank.
        let low = split.clone().keep_rows(&[]);
        assert_eq!(low.parameters(), rank * (rows + cols));
        let error: f64 = low.dense().iter().zip(&matrix).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let exact = faer::Mat::from_fn(rows, cols, |i, j| f64::from(matrix[i * cols + j])).thin_svd().unwrap();
        let values = exact.S().column_vector();
        let best: f64 = (rank..values.nrows()).map(|i| values[i] * values[i]).sum();
        assert!(error <= 1.02 * best + 1e-9, "{error} {best}");
    }
}

#[test]
fn the_compact_form_is_the_masked_one() {
    let (rows, cols) = (11, 7);
    let matrix = noise(rows * cols, 4);
    let split = LowRankSparse::split(&matrix, rows, cols, 2).unwrap();
    let mut masked = split.clone();
    for row in (0..rows).filter(|row| ![1, 4, 9].contains(row)) {
        masked.sparse[row * cols..(row + 1) * cols].fill(0.0);
    }
    let compact = split.keep_rows(&[1, 4, 9]);
    assert_eq!(compact.parameters(), 2 * (rows + cols) + 3 * cols);
    assert!(close(&compact.dense(), &masked.dense(), 1e-6));
    let x = noise(5 * cols, 5);
    assert!(close(&compact.forward(&x), &masked.forward(&x), 1e-5));
    // y = x (L R + S)^T
    let dense = compact.dense();
    for (t, y) in compact.forward(&x).iter().enumerate() {
        let (token, row) = (t / rows, t % rows);
        let expected: f32 = (0..cols).map(|c| x[token * cols + c] * dense[row * cols + c]).sum();
        assert!((y - expected).abs() < 1e-5);
    }
}

#[test]
fn an_expert_runs_without_its_matrices() {
    for make in [expert, biased_expert] {
        let weights = make(8, 12, 5);
        let compression = Compression { rank: 3, keep_rows: 0.25, rows: RowScore::Magnitude, ranks: Ranks::Same };
        let compact = CompactExpert::compress(&weights, &compression, None).unwrap();
        let x = noise(6 * 8, 6);
        let found = compact.forward(&x, Activation::Silu);
        let expected = compact.dense().forward(&x, Activation::Silu);
        assert!(close(&found, &expected, 1e-4));
        let kept = compact.gate.kept.len() + compact.up.kept.len() + compact.down.kept.len();
        assert_eq!(kept, (12 + 12 + 8) / 4);
        let whole = Compression { rank: 3, keep_rows: 1.0, rows: RowScore::Magnitude, ranks: Ranks::Same };
        let whole = CompactExpert::compress(&weights, &whole, None).unwrap().dense();
        assert!(close(&whole.gate, &weights.gate, 1e-6) && close(&whole.down, &weights.down, 1e-6));
    }
}

#[test]
fn rows_are_kept_by_score_over_all_matrices() {
    let scores = vec![vec![1.0, 5.0], vec![4.0, 3.0, 3.0], vec![3.0]];
    assert_eq!(kept_rows(&scores, 0.5), [vec![1], vec![0, 1], vec![]]);
    assert_eq!(kept_rows(&scores, 0.0), vec![Vec::<u32>::new(); 3]);
    assert_eq!(kept_rows(&scores, 1.0), [vec![0, 1], vec![0, 1, 2], vec![0]]);
    // 0.7 of 6 rows: 4.
    assert_eq!(kept_rows(&scores, 0.7).iter().map(Vec::len).sum::<usize>(), 4);
}

#[test]
fn fisher_scores_weigh_rows_by_their_units() {
    let weights = expert(4, 3, 7);
    let split = CompactExpert::split(&weights, 1).unwrap();
    let [gate, _, down] = split.row_scores(RowScore::Fisher, Some(&[0.0, 1.0, 2.0])).unwrap();
    let square = |m: &LowRankSparse, row: usize, col: usize| f64::from(m.sparse[row * m.cols + col]).powi(2);
    assert_eq!(gate[0], 0.0);
    let expected = 2.0 * (0..4).map(|c| square(&split.gate, 2, c)).sum::<f64>() / 4.0;
    assert!((gate[2] - expected).abs() < 1e-9);
    let expected = (square(&split.down, 1, 1) + 2.0 * square(&split.down, 1, 2)) / 3.0;
    assert!((down[1] - expected).abs() < 1e-9);
    assert!(split.row_scores(RowScore::Fisher, Some(&[1.0])).unwrap_err().to_string().contains("3 units"));
    assert!(split.row_scores(RowScore::Fisher, None).is_err());
}

#[test]
fn the_schedule_has_its_break_points() {
    let compression = Compression { rank: 1, keep_rows: 0.1, rows: RowScore::Magnitude, ranks: Ranks::Same };
    let keep = |step| compression.keep_at(step, 500, 50, 200);
    assert_eq!([keep(0), keep(50), keep(300), keep(500)], [1.0, 1.0, 0.1, 0.1]);
    assert!((keep(175) - (0.1 + 0.9 * 0.125)).abs() < 1e-12);
    assert!((50..300).all(|step| keep(step) > keep(step + 1)));
    assert!(Compression { keep_rows: 1.5, ..compression }.validate().is_err());
    assert!(Compression { rank: 0, ..compression }.validate().is_err());
}
