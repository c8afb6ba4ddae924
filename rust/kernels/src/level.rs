//! Which instructions the kernels may use: chosen once per process, forced by the variable `FASTFT_SIMD`.

use std::sync::OnceLock;

use thiserror::Error;

/// A CPU level; a higher one of the same architecture has all that a lower one has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Plain loops: the specification of every kernel.
    Scalar,
    /// NEON, which every CPU of `aarch64` has: casts, products and sums in plain Rust, shaped so that the compiler makes
    /// vector code of them. 4-bit kernels and `DoRA`'s are the scalar ones there. Not measured on such a CPU yet.
    Neon,
    /// AVX2 with FMA and F16C (`x86_64`, from 2013).
    Avx2,
    /// AVX-512 F, BW, DQ and VL on top of [`Level::Avx2`].
    Avx512,
}

/// The variable that forces a level.
pub const VARIABLE: &str = "FASTFT_SIMD";

/// `FASTFT_SIMD` asks for something that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LevelError {
    /// The name is none of ours.
    #[error("FASTFT_SIMD={0:?} is no CPU level; use scalar, neon, avx2 or avx512, or unset the variable")]
    Unknown(String),
    /// The name is known, the CPU lacks it.
    #[error("FASTFT_SIMD={asked}: this CPU has no such level; use {best} or scalar, or unset the variable")]
    Unavailable {
        /// What the variable says.
        asked: &'static str,
        /// The highest level of this CPU.
        best: &'static str,
    },
}

impl Level {
    /// Every level, lowest first.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512];

    /// The name as `FASTFT_SIMD` spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this CPU has the level.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            // Its bodies are plain Rust: the tests of this crate run them on any CPU.
            Self::Neon => cfg!(any(target_arch = "aarch64", test)),
            Self::Avx2 => has_avx2(),
            Self::Avx512 => has_avx2() && has_avx512(),
        }
    }

    fn best() -> Self {
        Self::ALL.into_iter().rev().find(|level| level.is_available()).unwrap_or(Self::Scalar)
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx512() -> bool {
    false
}

/// A level that this CPU is known to have. Kernels take this, so that no variant can run where it must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cpu(Level);

impl Cpu {
    /// The CPU at `level`, or `None` where it lacks it.
    #[must_use]
    pub fn at(level: Level) -> Option<Self> {
        level.is_available().then_some(Self(level))
    }

    /// The level of this process: the highest there is, or what `FASTFT_SIMD` says.
    ///
    /// # Errors
    /// `FASTFT_SIMD` names an unknown level or one that the CPU lacks.
    pub fn chosen() -> Result<Self, LevelError> {
        static CHOICE: OnceLock<Result<Cpu, LevelError>> = OnceLock::new();
        CHOICE
            .get_or_init(|| {
                choose(std::env::var_os(VARIABLE).map(|name| name.to_string_lossy().into_owned()).as_deref())
            })
            .clone()
    }

    /// The level itself. Compare with "at least", never with "equals".
    #[must_use]
    pub fn level(self) -> Level {
        self.0
    }
}

fn choose(asked: Option<&str>) -> Result<Cpu, LevelError> {
    let Some(name) = asked.filter(|name| !name.is_empty()) else {
        return Ok(Cpu(Level::best()));
    };
    let level = Level::ALL
        .into_iter()
        .find(|level| level.name() == name)
        .ok_or_else(|| LevelError::Unknown(name.to_owned()))?;
    Cpu::at(level).ok_or(LevelError::Unavailable { asked: level.name(), best: Level::best().name() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unset_or_empty_means_the_best() {
        assert_eq!(choose(None), Ok(Cpu(Level::best())));
        assert_eq!(choose(Some("")), Ok(Cpu(Level::best())));
    }

    #[test]
    fn scalar_can_always_be_forced() {
        assert_eq!(choose(Some("scalar")).map(Cpu::level), Ok(Level::Scalar));
    }

    #[test]
    fn an_unknown_level_is_an_error() {
        let message = choose(Some("sse9")).map_err(|error| error.to_string());
        assert_eq!(
            message.err().as_deref(),
            Some("FASTFT_SIMD=\"sse9\" is no CPU level; use scalar, neon, avx2 or avx512, or unset the variable")
        );
    }

    #[test]
    fn a_level_that_the_cpu_lacks_is_an_error() {
        for level in Level::ALL {
            assert_eq!(choose(Some(level.name())).is_ok(), level.is_available(), "{level:?}");
        }
    }
}
