"""What a filter may say. Whatever is not listed here is refused; docs/filters.md shows the lists to authors.

Nothing listed reads anything but its arguments, depends on the clock or on chance, or makes a longer list or
text than it was given: no range, repeat, flatten, concatenation or reduction. DuckDB can neither interrupt nor
bound some of those.
"""

from __future__ import annotations

from transforms.filters.engine import MACROS

MAX_EXPRESSIONS = 50
MAX_DEPTH = 60
MAX_SUBQUERY_DEPTH = 4
MAX_NODES = 5_000  # after names given with AS are put in place: they double, and double again


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


OPERATORS = _words("+ - * / // % ** ^ & | @ ~~ !~~ ~~* !~~*")

SCALAR_FUNCTIONS = frozenset(MACROS) | _words(
    """
    abs sqrt cbrt ln log log2 log10 exp pow power least greatest nullif if isnan isfinite isinf
    round floor ceil ceiling trunc sign mod fmod pi
    sin cos tan asin acos atan atan2 degrees radians
    lower upper starts_with ends_with contains prefix suffix length strlen substring substr like_escape not_like_escape
    struct_pack struct_extract row
    """
)

MAPPING_FUNCTIONS = _words("list_transform array_transform list_apply array_apply")
SELECTING_FUNCTIONS = _words("list_filter array_filter")
SLICING_FUNCTIONS = _words("list_slice array_slice list_extract list_element array_extract list_reverse")
COUNTING_FUNCTIONS = _words("len length array_length")
AGGREGATING_FUNCTIONS = _words("list_aggregate list_aggr array_aggregate array_aggr")

LIST_FUNCTIONS = (
    MAPPING_FUNCTIONS
    | SELECTING_FUNCTIONS
    | SLICING_FUNCTIONS
    | COUNTING_FUNCTIONS
    | AGGREGATING_FUNCTIONS
    | _words(
        """
        list_value list_zip list_where list_select list_first list_last
        list_contains list_has array_contains list_position list_has_any list_has_all
        list_sort array_sort list_reverse_sort list_distinct list_unique
        list_min list_max list_sum list_avg list_count list_median list_mode list_mad list_product
        list_stddev_samp list_stddev_pop list_var_samp list_var_pop list_sem list_skewness list_kurtosis
        list_bool_and list_bool_or list_any_value
        """
    )
)

AGGREGATES = _words(
    """
    count count_star sum avg mean min max median mode mad product quantile_cont quantile_disc
    stddev stddev_samp stddev_pop variance var_samp var_pop sem skewness kurtosis
    regr_slope regr_intercept regr_r2 regr_count corr covar_samp covar_pop
    arg_min arg_max min_by max_by first last any_value bool_and bool_or count_if
    """
)

WINDOWS = _words("row_number rank dense_rank lag lead first_value last_value nth_value")

CAST_TYPES = _words(
    """
    boolean bool tinyint smallint integer int bigint utinyint usmallint uinteger ubigint
    float real double decimal numeric varchar text string list
    """
)

RANK_TYPES = _words(
    "BOOLEAN TINYINT SMALLINT INTEGER BIGINT HUGEINT UTINYINT USMALLINT UINTEGER UBIGINT FLOAT DOUBLE VARCHAR"
)

# --- DuckDB's parse tree: what a node may carry, by class. A key that is not here (of a newer DuckDB, say)
# is refused unless it is empty.

OPERATOR_TYPES = _words(
    """
    COMPARE_IN COMPARE_NOT_IN OPERATOR_NOT OPERATOR_IS_NULL OPERATOR_IS_NOT_NULL OPERATOR_COALESCE OPERATOR_TRY
    ARRAY_EXTRACT ARRAY_SLICE STRUCT_EXTRACT
    """
)

ANY_NODE_KEYS = _words("class type alias query_location query_location_length")

NODE_KEYS = {
    "COLUMN_REF": _words("column_names"),
    "CONSTANT": _words("literal"),
    "COMPARISON": _words("left right"),
    "CONJUNCTION": _words("children"),
    "OPERATOR": _words("children"),
    "BETWEEN": _words("input lower upper"),
    "CASE": _words("case_checks else_expr"),
    "CAST": _words("child try_cast type_expr"),
    "LAMBDA": _words("lhs expr syntax_type"),
    "SUBQUERY": _words("subquery_type subquery child comparison_type"),
    "FUNCTION": _words("function_name filter order_bys distinct is_operator arguments qualified_name"),
    "WINDOW": _words(
        """
        function_name partitions orders arg_orders start end start_expr end_expr offset_expr default_expr
        ignore_nulls has_ignore_nulls filter_expr exclude_clause distinct arguments qualified_name
        """
    ),
}

SELECT_KEYS = _words(
    """
    type modifiers select_list from_table where_clause group_expressions group_sets aggregate_handling having qualify
    """
)
