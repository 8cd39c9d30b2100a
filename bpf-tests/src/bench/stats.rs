//! Medians, spreads and ratios of few and noisy measurements.

/// `None` of nothing.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let sorted = sorted(values);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    Some(f64::midpoint(*sorted.get(middle - 1)?, upper))
}

/// The smallest value that at least `percent` of a hundred do not exceed; `None` of nothing.
pub(super) fn percentile(values: &[f64], percent: usize) -> Option<f64> {
    let rank = (values.len() * percent).div_ceil(100);
    sorted(values).get(rank.saturating_sub(1)).copied()
}

/// From the smallest to the largest, as a share of the median: what two runs may differ by without a cause.
pub(super) fn spread(values: &[f64]) -> Option<f64> {
    let sorted = sorted(values);
    Some((sorted.last()? - sorted.first()?) / median(values)?)
}

/// A value against the mean of the baseline's runs just before and just after it: what drifts slowly, such as a noisy
/// neighbour or a CPU's clock, cancels out.
pub(super) fn ratio(value: f64, [before, after]: [f64; 2]) -> f64 {
    value / f64::midpoint(before, after)
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_or_between_the_two() {
        assert_eq!(median(&[3.0, 1.0, 100.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 100.0]), Some(3.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 99), Some(99.0));
        assert_eq!(percentile(&values, 50), Some(50.0));
        assert_eq!(percentile(&values, 0), Some(1.0));
        assert_eq!(percentile(&[7.0, 5.0, 6.0], 99), Some(7.0));
        assert_eq!(percentile(&[], 99), None);
    }

    #[test]
    fn a_spread_is_relative() {
        assert_eq!(spread(&[90.0, 100.0, 110.0]), Some(0.2));
        assert_eq!(spread(&[5.0]), Some(0.0));
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn a_drift_of_the_machine_cancels_out() {
        // The machine slows down by half while the ratio stays.
        assert_eq!(ratio(95.0, [110.0, 90.0]), 0.95);
        assert_eq!(ratio(57.0, [70.0, 50.0]), 0.95);
    }
}
