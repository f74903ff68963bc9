//! Conversions between on-disk and in-memory types with the same fields or variants. A field or
//! variant that only one of them has does not compile.

macro_rules! same_fields {
    ($stored:ident = $live:ident { $($field:ident),* $(,)? }) => {
        impl From<$live> for $stored {
            fn from(live: $live) -> Self {
                let $live { $($field),* } = live;
                Self { $($field),* }
            }
        }

        impl From<$stored> for $live {
            fn from(stored: $stored) -> Self {
                let $stored { $($field),* } = stored;
                Self { $($field),* }
            }
        }
    };
}

macro_rules! same_variants {
    ($stored:ident = $live:ident { $($variant:ident),* $(,)? }) => {
        impl From<$live> for $stored {
            fn from(live: $live) -> Self {
                match live {
                    $($live::$variant => Self::$variant,)*
                }
            }
        }

        impl From<$stored> for $live {
            fn from(stored: $stored) -> Self {
                match stored {
                    $($stored::$variant => Self::$variant,)*
                }
            }
        }
    };
}

/// Converts all items.
pub(super) fn all<T, U: From<T>>(items: Vec<T>) -> Vec<U> {
    items.into_iter().map(U::from).collect()
}

pub(super) use {same_fields, same_variants};
