//! Median and extremes of a few numbers.

use serde_json::{Value, json};

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// None of no values.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            1 => values[middle],
            _ => (values[middle - 1] + values[middle]) / 2.0,
        };
        Some(Spread { median, min, max })
    }

    /// A number that is measured once; None: it is none.
    pub(crate) fn single(value: f64) -> Option<Self> {
        value.is_finite().then_some(Spread { median: value, min: value, max: value })
    }

    /// In relation to numbers from other rounds, which makes a wide range.
    pub(crate) fn over(self, other: Spread) -> Option<Self> {
        (other.min > 0.0).then(|| Spread {
            median: self.median / other.median,
            min: self.min / other.max,
            max: self.max / other.min,
        })
    }

    /// For programs.
    pub(crate) fn json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_takes_the_middle() {
        assert!(Spread::of(Vec::new()).is_none());
        let odd = Spread::of(vec![3.0, 1.0, 2.5]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max), (2.5, 1.0, 3.0));
        assert_eq!(Spread::of(vec![1.0, 2.0]).unwrap().median, 1.5);
        assert!(Spread::single(f64::NAN).is_none());
    }

    #[test]
    fn ranges_widen() {
        let ratio =
            Spread { median: 6.0, min: 4.0, max: 8.0 }.over(Spread { median: 2.0, min: 1.0, max: 4.0 });
        assert_eq!(ratio, Some(Spread { median: 3.0, min: 1.0, max: 8.0 }));
        assert!(Spread::single(1.0).unwrap().over(Spread::single(0.0).unwrap()).is_none());
    }
}
